// SPDX-License-Identifier: MIT
// Shared libraries that are looked up at run time, so that the module loads without them.
#pragma once

#ifdef _WIN32
#include <windows.h>
#else
#include <dlfcn.h>
#endif

namespace internimage {

#ifdef _WIN32
inline void* open_library(const char* name) { return reinterpret_cast<void*>(LoadLibraryA(name)); }
inline void* loaded_library(const char* name) { return reinterpret_cast<void*>(GetModuleHandleA(name)); }
inline void* symbol_of(void* library, const char* name) {
  return reinterpret_cast<void*>(GetProcAddress(static_cast<HMODULE>(library), name));
}
// Of the library of torch that this module is linked to.
inline void* symbol_of_torch(const char* name) { return symbol_of(loaded_library("torch_cpu.dll"), name); }
#else
inline void* open_library(const char* name) { return dlopen(name, RTLD_NOW | RTLD_LOCAL); }
// Only if the process has loaded it already.
inline void* loaded_library(const char* name) { return dlopen(name, RTLD_NOW | RTLD_LOCAL | RTLD_NOLOAD); }
inline void* symbol_of(void* library, const char* name) { return dlsym(library, name); }
// Of the library of torch that this module is linked to.
inline void* symbol_of_torch(const char* name) { return dlsym(RTLD_DEFAULT, name); }
#endif

}  // namespace internimage
