# SPDX-License-Identifier: MIT
"""Runs an exported file in OpenVINO, in float32, where neither torch nor internimage is installed.

    python run_openvino.py FILE INPUTS.npz OUTPUTS.npz

INPUTS has arrays input0, input1, ...; OUTPUTS gets output0, output1, ...
"""

import sys

import numpy as np
import openvino


def main(path: str, inputs: str, outputs: str) -> None:
    # else bfloat16 where the processor has it
    model = openvino.compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    with np.load(inputs) as given:
        found = {
            name.replace("input", "output"): next(iter(model({"image": given[name]}).values())) for name in given.files
        }
    np.savez(outputs, **found)


if __name__ == "__main__":
    main(*sys.argv[1:])
