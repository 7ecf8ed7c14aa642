# SPDX-License-Identifier: MIT
"""The model card of a converted folder: README.md with the Hub's metadata, by huggingface_hub's own classes."""

from huggingface_hub import EvalResult, ModelCardData

from ..models.families import FamilyModel, family_of
from ..weights.released import HUB_PTH_REPO, Published

_UPSTREAM = "https://github.com/OpenGVLab/InternImage"


def _cost(published: Published | None) -> str:
    if published is None or published.gmacs is None:
        return ""
    return f", {published.gmacs:g}G multiply-accumulates as published"


def model_card(
    model: FamilyModel,
    name: str,
    source: str,
    published: Published | None = None,
    started_from: str | None = None,
    parameters: int = 0,
    dtypes: list[str] | None = None,
    head_from_22k: bool = False,
    headless: bool = False,
) -> str:
    """The text of README.md.

    Args:
        model: The model; its `pretrained_cfg` has the image size.
        name: Architecture, with the tag of released weights.
        source: Where the weights came from.
        published: What upstream published about them; None for other weights, for which the card states no license,
            data or accuracy.
        started_from: Repository of the weights of a plain ResNet that these are, with offsets of zero; the model's
            `pretrained_cfg` has their license.
        parameters: Their number.
        dtypes: Of the tensors.
        head_from_22k: The classifier has ImageNet-1k's rows of an ImageNet-22k one.
        headless: The weights are of a backbone only.
    """
    size = model.pretrained_cfg["input_size"][-1]
    data = ModelCardData(
        library_name="timm",
        pipeline_tag="image-feature-extraction" if headless or model.num_classes == 0 else "image-classification",
        tags=["timm", "internimage", "image-classification", "image-feature-extraction"],
        model_name=name,
        ignore_metadata_errors=False,
    )
    facts = [
        f"- Parameters: {parameters / 1e6:.1f}M, stored as {', '.join(dtypes or [])}",
        f"- Images: {size} x {size}" + _cost(published),
        f"- Classes: {model.num_classes or 'none, a backbone'}",
        f"- Converted from: `{source}`",
    ]
    if published is not None:
        # the published accuracy was not measured with a head of selected rows
        measured = published.top1 is not None and not head_from_22k
        data.license = "mit"
        data.datasets = ["imagenet-1k"] if published.pretrain == "ImageNet-1k" else ["imagenet-22k"]
        if model.num_classes == 1000 and "imagenet-1k" not in data.datasets and not head_from_22k:
            data.datasets.append("imagenet-1k")
        data.base_model = published.hub_id or HUB_PTH_REPO
        facts.insert(1, f"- Pretraining: {published.pretrain}")
        if measured:
            data.metrics = ["accuracy"]
            data.eval_results = [
                EvalResult(
                    task_type="image-classification",
                    task_name="Image classification",
                    dataset_type="imagenet-1k",
                    dataset_name="ImageNet-1k",
                    dataset_split="validation",
                    metric_type="accuracy",
                    metric_name="Top-1, as published",
                    metric_value=published.top1,
                    source_name="OpenGVLab/InternImage",
                    source_url=_UPSTREAM,
                )
            ]
            facts.append(f"- ImageNet-1k top-1, as published and not measured again: {published.top1} %")
    family = family_of(name)
    kind, citation = ("InternImage", "") if family is None else (family.name, family.citation)
    if started_from is not None:
        data.base_model = started_from
        data.license = model.pretrained_cfg.get("license")
    if head_from_22k:
        facts.append("- The classifier has the rows of an ImageNet-22k one that are ImageNet-1k's classes")
    about = (
        f"Weights of InternImage by OpenGVLab ({_UPSTREAM}, MIT license), in timm's format."
        if published is not None
        else f"The weights of `{started_from}` in a {kind}, in timm's format. Its offsets are zero: untrained, it "
        "computes what that model does."
        if started_from is not None
        else f"{kind} weights in timm's format. Their license, data and accuracy were not known when they were "
        "converted: state them here."
    )
    use = (
        'maps = timm.create_model("hf-hub:OWNER/NAME", pretrained=True, features_only=True)'
        if headless
        else 'model = timm.create_model("hf-hub:OWNER/NAME", pretrained=True)'
    )
    transformers = (
        ""
        if headless or model.num_classes == 0
        else """
```python
import internimage
from transformers import AutoImageProcessor, AutoModelForImageClassification

processor = AutoImageProcessor.from_pretrained("OWNER/NAME")
model = AutoModelForImageClassification.from_pretrained("OWNER/NAME")
```
"""
    )
    facts_text = "\n".join(facts)
    cite = f"\n## Citation\n\n```bibtex\n{citation}\n```\n" if citation else ""
    return f"""---
{data.to_yaml()}
---

# {name}

{about}

{facts_text}

## Use

The package `internimage` has the architecture; import it first.

```python
import internimage  # registers the models
import timm

{use}
```
{transformers}{cite}"""
