# SPDX-License-Identifier: MIT
"""The card beside an exported file: what it is, its inputs and outputs, and how to run it."""

from .description import Description

_ONNX = """```python
import numpy as np
import onnxruntime

session = onnxruntime.InferenceSession("{file}")
image = np.{example}
{outputs} = session.run(None, {{"image": image}})
```
"""

# without the hint OpenVINO computes in bfloat16 on a processor that has it, and is off by a hundredth of the range
_OPENVINO = """OpenVINO, in float32; without the hint it takes bfloat16 where the processor has it:

```python
import numpy as np
import openvino

model = openvino.compile_model("{file}", "CPU", {{"INFERENCE_PRECISION_HINT": "f32"}})
image = np.{example}
{outputs} = model({{"image": image}}).values()
```
"""

_PROGRAM = """```python
import torch
{imports}
model = torch.export.load("{file}").module()
{outputs} = model(torch.randn({shape}){cast})
```
"""

_PACKAGE = """```python
import os
import torch
{imports}
os.environ["AOTI_RUNTIME_CHECK_INPUTS"] = "1"  # without it an image of a wrong shape is answered from foreign memory
model = torch._inductor.aoti_load_package("{file}")
{outputs} = model(torch.randn({shape}){cast})
```
"""


def card(description: Description, file: str, size: int) -> str:
    """The text of the card.

    Args:
        description: Of the file.
        file: Its name.
        size: Its bytes, with external data.
    """
    parts = [
        f"# {file}",
        f"{description.architecture}, weights `{description.weights}`, exported by internimage "
        f"{description.versions.get('internimage', '')}.",
        _facts(description, size),
        f"## Input and output\n\n{_inputs(description)}\n\n{_outputs(description)}",
        f"## Run it\n\n{_code(description, file)}\n{_runtimes(description, file)}",
        f"## Verification\n\n{_verification(description)}",
    ]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def _facts(description: Description, size: int) -> str:
    rows = {
        "format": description.format + (f", opset {description.opset}" if description.opset else ""),
        "operator": {
            "deform-conv": "ONNX DeformConv",
            "grid-sample": "ONNX GridSample",
            "internimage": "internimage::dcnv3",
            "decomposed": "plain torch",
        }.get(description.operator, "none that is deformable"),
        "precision": description.dtype + (f", int8 ({description.quantization})" if description.quantization else ""),
        "size": f"{size / 2**20:.1f} MiB",
        "classes": str(len(description.classes)) if description.classes else "none: maps of the stages",
        "license of the weights": description.license or "not stated",
        "SHA-256 of the weights": f"`{description.checksum}`",
        "made with": ", ".join(f"{name} {version}" for name, version in sorted(description.versions.items())),
    }
    if description.device:
        rows["built for"] = description.device
    return "| | |\n|---|---|\n" + "\n".join(f"| {name} | {value} |" for name, value in rows.items())


def _shape(description: Description) -> tuple[int, ...]:
    return (1, *description.input_size)


def _inputs(description: Description) -> str:
    channels, height, width = description.input_size
    if description.preprocessed:
        return (
            "`image`: uint8, (batch, height, width, 3), RGB, of any size. The file resizes, crops and normalizes it by "
            "itself."
        )
    given = {"batch": 1, "channels": channels, "height": height, "width": width}
    shape = f"({', '.join(name if name in description.open else str(value) for name, value in given.items())})"
    mean, std = (", ".join(f"{value:g}" for value in values) for values in (description.mean, description.std))
    dtype = description.dtype if description.format == "onnx" else "float32"
    resized = round(height / description.crop_pct)
    return (
        f"`image`: {dtype}, {shape}, made for {height} x {width}. Preprocessing: resize the shorter side to {resized} "
        f"({description.interpolation}), crop {height} x {width} from the middle, divide by 255, subtract ({mean}), "
        f"divide by ({std})."
    )


def _outputs(description: Description) -> str:
    if description.features:
        return f"{', '.join(f'`{name}`' for name in description.features)}: the maps of the stages, NCHW."
    what = "probabilities" if description.preprocessed else "logits"
    return f"`{what}`: (batch, {len(description.classes)}), in the order of the classes in the file's metadata."


def _code(description: Description, file: str) -> str:
    if description.format == "onnx":
        return _ONNX.format(file=file, example=_example(description), outputs=_unpacked(description))
    names = ", ".join(description.features) or "logits"
    shape = ", ".join(map(str, _shape(description)))
    imports = "import internimage  # its operator\n" if description.operator == "internimage" else ""
    cast = ".half()" if description.dtype == "float16" else ""
    template = _PACKAGE if description.format == "aoti" else _PROGRAM
    return template.format(file=file, imports=imports, outputs=names, shape=shape, cast=cast)


def _example(description: Description) -> str:
    """The call of numpy that makes an input."""
    if description.preprocessed:
        return "zeros((1, 480, 640, 3), np.uint8)"
    return f"zeros(({', '.join(map(str, _shape(description)))}), np.{description.dtype})"


def _unpacked(description: Description) -> str:
    """What a sequence of the outputs is assigned to."""
    if description.features:
        return ", ".join(description.features)
    return "(probabilities,)" if description.preprocessed else "(logits,)"


def _runtimes(description: Description, file: str) -> str:
    if description.format != "onnx":
        needs = "needs `pip install internimage`" if description.operator == "internimage" else "needs torch alone"
        return f"It {needs}; made with torch {description.versions.get('torch', '')}, which a newer one reads."
    found = []
    if description.operator == "deform-conv":
        found.append("onnxruntime runs DeformConv from 1.25 on, and fast from 1.27 on.")
    if description.preprocessed:
        found.append(
            "OpenVINO resizes without the antialiasing, without an error, and TensorRT refuses it: for these export "
            "with `--operator grid-sample` and without `--with-preprocess`."
        )
    elif description.quantization == "static":
        found.append(
            "OpenVINO's answers from int8 activations are further off than onnxruntime's, and TensorRT takes no "
            "unsigned ones: for these export with `--operator grid-sample` and without `--quantize`."
        )
    elif description.operator == "deform-conv":
        found.append(
            "TensorRT has it, but slowly and with coordinates rounded to half in fp16, and OpenVINO has not: for these "
            "export with `--operator grid-sample`."
        )
    else:
        found.append(_OPENVINO.format(file=file, example=_example(description), outputs=_unpacked(description)))
        if description.quantization:
            found.append("TensorRT has no dynamic quantization: for it export without `--quantize`.")
        else:
            found.append(_tensorrt(description, file))
    return "\n".join(found)


def _tensorrt(description: Description, file: str) -> str:
    channels, height, width = description.input_size
    shapes = f"image:1x{channels}x{height}x{width}"
    dynamic = f" --minShapes={shapes} --optShapes={shapes} --maxShapes=image:8x{channels}x{height}x{width}"
    command = f"trtexec --onnx={file}{dynamic if description.open else ''}"
    after = "`--noTF32` computes in float32 and not in TF32."
    if description.dtype != "float32":
        command, after = f"{command} --stronglyTyped", "TensorRT 11 needs no `--stronglyTyped`."
    return f"TensorRT (not run where this was made):\n\n```\n{command}\n```\n\n{after}"


def _verification(description: Description) -> str:
    found = description.verification
    if not found:
        return "This file was NOT verified (`--no-verify`)."
    if "equal" in found:
        return f"{100 * found['equal']:.1f} % of {found['images']} images get the same class as in float64."
    inputs = " and ".join("x".join(map(str, shape)) for shape in found["inputs"])
    return (
        f"Read in another process and run on inputs of {inputs}. Largest difference to {found['reference']}: "
        f"{found['largest_difference']:.2g}; of the model in eager torch: {found['eager']:.2g}; the outputs span "
        f"{found['range']:.3g}."
    )
