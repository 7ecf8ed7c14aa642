// SPDX-License-Identifier: MIT
// A CUDA runtime and driver without a GPU, for LD_PRELOAD: memory of a "GPU" is the host's, and launches are recorded
// instead of run. It has what torch needs to make tensors on its devices, and what csrc/cuda/driver calls.
//
// The library's soname is libcuda.so.1, so that it is also what `dlopen("libcuda.so.1")` finds.
#define _GNU_SOURCE
#include <cuda_runtime_api.h>

#include <pthread.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

// ---- what tests set and read

int stand_in_devices = 2, stand_in_major = 9, stand_in_minor = 0;
int stand_in_load_error = 0, stand_in_loads_to_fail = 0, stand_in_launch_error = 0;
int stand_in_synchronized = 0, stand_in_capturing = 0, stand_in_records = 1;
// Called for a launch, with the kernel's name, before it is over.
void (*stand_in_on_launch)(const char* name, void** arguments, unsigned blocks, unsigned threads) = NULL;

__attribute__((constructor)) static void read_capability(void) {
  const char* given = getenv("STAND_IN_CAPABILITY");
  if (given) sscanf(given, "%d.%d", &stand_in_major, &stand_in_minor);
}

static char events[1 << 20];
static size_t events_end = 0;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

static void event(const char* format, ...) {
  if (!stand_in_records) return;
  pthread_mutex_lock(&lock);
  va_list values;
  va_start(values, format);
  if (events_end + 1000 < sizeof(events)) {
    events_end += vsnprintf(events + events_end, 900, format, values);
    events[events_end++] = '\n';
    events[events_end] = 0;
  }
  va_end(values);
  pthread_mutex_unlock(&lock);
}

const char* stand_in_events(void) { return events; }
void stand_in_forget(void) {
  events_end = 0;
  events[0] = 0;
  stand_in_synchronized = 0;
}

// ---- the runtime, as torch uses it

static __thread int device = 0;
static __thread int has_context = 0;

cudaError_t cudaGetDeviceCount(int* count) { return *count = stand_in_devices, cudaSuccess; }
cudaError_t cudaGetDevice(int* d) { return *d = device, cudaSuccess; }
cudaError_t cudaSetDevice(int d) {
  if (d < 0 || d >= stand_in_devices) return cudaErrorInvalidDevice;
  device = d;
  has_context = 1;
  return cudaSuccess;
}
cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp* p, int d) {
  memset(p, 0, sizeof(*p));
  snprintf(p->name, sizeof(p->name), "Stand-in %d", d);
  p->totalGlobalMem = 1ull << 33;
  p->major = stand_in_major;
  p->minor = stand_in_minor;
  p->multiProcessorCount = 4;
  p->warpSize = 32;
  p->maxThreadsPerBlock = 1024;
  p->maxThreadsPerMultiProcessor = 2048;
  p->regsPerMultiprocessor = 65536;
  p->sharedMemPerBlock = 49152;
  p->maxGridSize[0] = 2147483647;
  p->maxGridSize[1] = p->maxGridSize[2] = 65535;
  p->maxThreadsDim[0] = p->maxThreadsDim[1] = 1024;
  p->maxThreadsDim[2] = 64;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, enum cudaDeviceAttr a, int d) {
  *value = a == cudaDevAttrComputeCapabilityMajor   ? stand_in_major
           : a == cudaDevAttrComputeCapabilityMinor ? stand_in_minor
                                                    : 1;
  return cudaSuccess;
}
cudaError_t cudaDriverGetVersion(int* v) { return *v = CUDART_VERSION, cudaSuccess; }
cudaError_t cudaRuntimeGetVersion(int* v) { return *v = CUDART_VERSION, cudaSuccess; }
cudaError_t cudaGetLastError(void) { return cudaSuccess; }
cudaError_t cudaPeekAtLastError(void) { return cudaSuccess; }
cudaError_t cudaDeviceCanAccessPeer(int* can, int a, int b) { return *can = 0, cudaSuccess; }
cudaError_t cudaDeviceGetStreamPriorityRange(int* low, int* high) { return *low = 0, *high = -1, cudaSuccess; }
cudaError_t cudaMemGetInfo(size_t* free_bytes, size_t* all) { return *free_bytes = *all = 1ull << 33, cudaSuccess; }

cudaError_t cudaMalloc(void** memory, size_t bytes) {
  if (posix_memalign(memory, 512, bytes)) return cudaErrorMemoryAllocation;
  memset(*memory, 0, bytes);  // kernels of torch that would fill it do not run
  return cudaSuccess;
}
cudaError_t cudaFree(void* memory) { return free(memory), cudaSuccess; }
cudaError_t cudaHostAlloc(void** memory, size_t bytes, unsigned flags) { return cudaMalloc(memory, bytes); }
cudaError_t cudaFreeHost(void* memory) { return cudaFree(memory); }
cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, enum cudaMemcpyKind kind) {
  return memcpy(to, from, bytes), cudaSuccess;
}
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, enum cudaMemcpyKind kind, cudaStream_t stream) {
  return memcpy(to, from, bytes), cudaSuccess;
}
cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t stream) {
  event("fill stream=%p", (void*)stream);
  return memset(to, value, bytes), cudaSuccess;
}
cudaError_t cudaPointerGetAttributes(struct cudaPointerAttributes* a, const void* p) {
  memset(a, 0, sizeof(*a));
  a->type = cudaMemoryTypeUnregistered;
  return cudaSuccess;
}

static intptr_t handles = 0x1000;
static void* handle(void) { return (void*)__atomic_add_fetch(&handles, 16, __ATOMIC_RELAXED); }
cudaError_t cudaStreamCreateWithPriority(cudaStream_t* s, unsigned flags, int p) { return *s = handle(), cudaSuccess; }
cudaError_t cudaStreamGetPriority(cudaStream_t s, int* p) { return *p = 0, cudaSuccess; }
cudaError_t cudaStreamQuery(cudaStream_t s) { return cudaSuccess; }
cudaError_t cudaStreamSynchronize(cudaStream_t s) {
  ++stand_in_synchronized;
  return event("synchronize stream=%p", (void*)s), cudaSuccess;
}
cudaError_t cudaDeviceSynchronize(void) {
  ++stand_in_synchronized;
  return event("synchronize device"), cudaSuccess;
}
cudaError_t cudaStreamWaitEvent(cudaStream_t s, cudaEvent_t e, unsigned flags) { return cudaSuccess; }
cudaError_t cudaStreamIsCapturing(cudaStream_t s, enum cudaStreamCaptureStatus* status) {
  *status = stand_in_capturing ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
  return cudaSuccess;
}
// The first arguments of all its versions.
cudaError_t capture_info(cudaStream_t, enum cudaStreamCaptureStatus*,
                         unsigned long long*) __asm__("cudaStreamGetCaptureInfo");
cudaError_t capture_info(cudaStream_t s, enum cudaStreamCaptureStatus* status, unsigned long long* id) {
  if (id) *id = 1;
  return cudaStreamIsCapturing(s, status);
}
static enum cudaStreamCaptureMode capture_mode = cudaStreamCaptureModeGlobal;
cudaError_t cudaThreadExchangeStreamCaptureMode(enum cudaStreamCaptureMode* mode) {
  enum cudaStreamCaptureMode before = capture_mode;
  capture_mode = *mode;
  return *mode = before, cudaSuccess;
}
// An event is the host's time at which it was recorded: how long the host took between two of them.
cudaError_t cudaEventCreateWithFlags(cudaEvent_t* e, unsigned flags) {
  return *e = calloc(1, sizeof(struct timespec)), cudaSuccess;
}
cudaError_t cudaEventRecord(cudaEvent_t e, cudaStream_t s) {
  return clock_gettime(CLOCK_MONOTONIC, (struct timespec*)e), cudaSuccess;
}
cudaError_t cudaEventRecordWithFlags(cudaEvent_t e, cudaStream_t s, unsigned flags) { return cudaEventRecord(e, s); }
cudaError_t elapsed_time(float* ms, cudaEvent_t from, cudaEvent_t to) {
  const struct timespec *a = (void*)from, *b = (void*)to;
  return *ms = 1e3 * (b->tv_sec - a->tv_sec) + 1e-6 * (b->tv_nsec - a->tv_nsec), cudaSuccess;
}
cudaError_t cudaEventElapsedTime(float* ms, cudaEvent_t from, cudaEvent_t to) { return elapsed_time(ms, from, to); }
cudaError_t cudaEventQuery(cudaEvent_t e) { return cudaSuccess; }
cudaError_t cudaEventSynchronize(cudaEvent_t e) { return ++stand_in_synchronized, cudaSuccess; }
cudaError_t cudaEventDestroy(cudaEvent_t e) { return free(e), cudaSuccess; }
cudaError_t cudaProfilerStart(void) { return cudaSuccess; }
cudaError_t cudaProfilerStop(void) { return cudaSuccess; }
cudaError_t cudaFuncGetAttributes(struct cudaFuncAttributes* a, const void* f) {
  memset(a, 0, sizeof(*a));
  a->maxThreadsPerBlock = 1024;
  a->binaryVersion = a->ptxVersion = 10 * stand_in_major + stand_in_minor;
  return cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* n, const void* f, int b, size_t s, unsigned g) {
  return *n = 4, cudaSuccess;
}
cudaError_t cudaLaunchKernel(const void* f, dim3 grid, dim3 block, void** arguments, size_t shared, cudaStream_t s) {
  return event("torch stream=%p", (void*)s), cudaSuccess;
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* f, void** arguments) {
  return event("torch stream=%p", (void*)config->stream), cudaSuccess;
}

// ---- the driver, as torch uses it

int cuDevicePrimaryCtxGetState(int d, unsigned* flags, int* active) { return *flags = 0, *active = 1, 0; }
static int unsupported(void) { return 801; }  // CUDA_ERROR_NOT_SUPPORTED
#define UNSUPPORTED(name) \
  int name(void) { return unsupported(); }
UNSUPPORTED(cuDeviceGet)
UNSUPPORTED(cuDeviceGetAttribute)
UNSUPPORTED(cuFuncGetAttribute)
UNSUPPORTED(cuFuncSetAttribute)
UNSUPPORTED(cuFuncSetCacheConfig)
UNSUPPORTED(cuLaunchCooperativeKernel)
UNSUPPORTED(cuLinkAddData_v2)
UNSUPPORTED(cuLinkComplete)
UNSUPPORTED(cuLinkCreate_v2)
UNSUPPORTED(cuModuleLoad)
UNSUPPORTED(cuModuleLoadDataEx)
UNSUPPORTED(cuOccupancyMaxActiveBlocksPerMultiprocessor)
UNSUPPORTED(cuPointerGetAttribute)
UNSUPPORTED(cuTensorMapEncodeTiled)
cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** function, unsigned version, unsigned long long f,
                                             enum cudaDriverEntryPointQueryResult* result) {
  *function = (void*)unsupported;
  if (result) *result = cudaDriverEntryPointSuccess;
  return cudaSuccess;
}

// ---- the driver, as csrc/cuda/driver uses it

struct function {
  int device;
  char name[400];
};

int cuGetErrorName(int error, const char** name) {
  static const char* names[] = {"CUDA_SUCCESS", "CUDA_ERROR_INVALID_VALUE", "CUDA_ERROR_OUT_OF_MEMORY"};
  *name = error == 222   ? "CUDA_ERROR_UNSUPPORTED_PTX_VERSION"
          : error == 200 ? "CUDA_ERROR_INVALID_IMAGE"
          : error == 701 ? "CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES"
          : error < 3    ? names[error]
                         : NULL;
  return *name == NULL;
}
int cuGetErrorString(int error, const char** text) { return *text = "in words", 0; }
int cuCtxGetCurrent(void** context) { return *context = has_context ? (void*)(intptr_t)(device + 1) : NULL, 0; }
int cuCtxSetCurrent(void* context) {
  event("context %d", (int)(intptr_t)context - 1);
  device = (int)(intptr_t)context - 1;
  return has_context = 1, 0;
}
int cuDevicePrimaryCtxRetain(void** context, int d) { return *context = (void*)(intptr_t)(d + 1), 0; }
int cuThreadExchangeStreamCaptureMode(int* mode) {
  return cudaThreadExchangeStreamCaptureMode((enum cudaStreamCaptureMode*)mode);
}
int cuModuleLoadData(void** module, const void* image) {
  if (!has_context) return 201;
  if (capture_mode != cudaStreamCaptureModeRelaxed) return 900;  // as during a capture
  const int is_elf = !memcmp(image, "\177ELF", 4);
  event("load device=%d %s", device, is_elf ? "cubin" : "ptx");
  if (stand_in_loads_to_fail > 0 && stand_in_loads_to_fail--) return stand_in_load_error;
  *module = (void*)(intptr_t)(device + 1);
  return 0;
}
int cuModuleUnload(void* module) { return 0; }
int cuModuleGetFunction(void** found, void* module, const char* name) {
  struct function* f = malloc(sizeof(struct function));
  f->device = device;
  snprintf(f->name, sizeof(f->name), "%s", name);
  return *found = f, 0;
}
int cuLaunchKernel(void* what, unsigned x, unsigned y, unsigned z, unsigned bx, unsigned by, unsigned bz,
                   unsigned shared, void* stream, void** arguments, void** extra) {
  const struct function* f = what;
  if (!has_context) return 201;
  if (f->device != device) return 400;  // a function of another device's module
  if (stand_in_launch_error) return stand_in_launch_error;
  event("launch %s device=%d grid=%u,%u,%u block=%u,%u,%u shared=%u stream=%p", f->name, device, x, y, z, bx, by, bz,
        shared, stream);
  if (stand_in_on_launch) stand_in_on_launch(f->name, arguments, x, bx);
  return 0;
}
