# SPDX-License-Identifier: MIT
"""`internimage info`."""

import argparse
import json
import platform
from importlib import metadata
from typing import Any

import torch

from .. import __version__, list_models
from ..export.packages import EXTRA, NEEDS, RUNTIMES, version
from ..extension import backend, build_facts, capability_note, cpu_capability, cuda_note, devices
from ..terminal import say


def run(arguments: argparse.Namespace) -> int:
    facts: dict[str, Any] = {
        "internimage": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "torch": torch.__version__,
        "torch_cuda": torch.version.cuda,
        "timm": metadata.version("timm"),
        "huggingface_hub": metadata.version("huggingface_hub"),
        "safetensors": metadata.version("safetensors"),
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "kernel_capability": cpu_capability(),
        "kernel_capability_note": capability_note() or None,
        "backends": [vars(backend("dcnv3", device)) | {"hardware": _hardware(device)} for device in devices()],
        "kernels_built_with": {k: v for k, v in build_facts().items() if k not in ("reason", "cuda")} or None,
        "cuda_kernels": cuda_note(),
        "models": list_models(),
        "export": {name: version(name) for name in RUNTIMES},
        "export_needs": {form: [name for name in names if version(name) is None] for form, names in NEEDS.items()},
    }
    if arguments.json:
        print(json.dumps(facts, indent=2))
        return 0
    say(f"internimage {facts['internimage']}, Python {facts['python']}, {facts['platform']}")
    say(f"torch {facts['torch']} (CUDA {facts['torch_cuda'] or 'none'}), timm {facts['timm']}")
    for entry in facts["backends"]:
        say(f"{entry['device']} ({entry['hardware']}): DCNv3 is served by {entry['name']}")
        if entry["reason"]:
            say(f"  why not faster: {entry['reason']}")
        if entry["device"] == "cpu" and facts["kernel_capability_note"]:
            say(f"  {facts['kernel_capability_note']}")
    built = facts["kernels_built_with"]
    say(f"kernels built with torch {built['torch']}" if built else "no compiled kernels are installed")
    say(f"CUDA kernels: {facts['cuda_kernels']}")
    say(f"models: {', '.join(facts['models'])}")
    installed = [f"{name} {found}" for name, found in facts["export"].items() if found]
    say(f"export: {', '.join(installed) or 'no runtimes are installed'}")
    for form, missing in facts["export_needs"].items():
        if missing:
            say(f"  {form} needs {', '.join(missing)}: {EXTRA}")
    return 0


def _hardware(device: str) -> str:
    if device == "cpu":
        return f"{torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"
    if device == "cuda":
        return ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
    return device
