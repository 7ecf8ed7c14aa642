# SPDX-License-Identifier: MIT
"""Whether the classes of a dataset are those of a model, in the same order."""

from torch import nn
from torch.utils.data import Dataset

from ...data.datasets import DataError, class_difference, class_names
from ...errors import some


def check_classes(model: nn.Module, dataset: Dataset) -> list[str]:
    """The names of the model's classes.

    Raises:
        DataError: The dataset's classes are not the model's.
    """
    names = class_names(dataset)
    if names is None:
        return [str(i) for i in range(model.num_classes)]
    trained = _trained_classes(model)
    if len(names) > model.num_classes:
        raise DataError(
            f"the dataset has {len(names)} classes and the model {model.num_classes}{_unknown(names, trained)}"
        )
    if trained and trained != names:
        differ = next((a, b) for a, b in zip([*trained, None], [*names, None]) if a != b)
        raise DataError(
            f"the dataset's classes are not those that the model was trained on (there '{differ[0]}', here "
            f"'{differ[1]}'; {class_difference(names, trained)}): pass a class map"
        )
    if len(names) < model.num_classes:
        raise DataError(
            f"the dataset has {len(names)} classes and the model {model.num_classes}, so their indices need not agree: "
            f"pass a class map (a file with a class a line, in the model's order), or name the dataset with --variant "
            f"if it is one of ImageNet's"
        )
    return names


def _trained_classes(model: nn.Module) -> list[str] | None:
    """The classes that were stored with the weights, in the order of the outputs."""
    trained = getattr(model, "pretrained_cfg", {}).get("label_names")
    return list(trained) if trained and len(trained) == model.num_classes else None


def _unknown(names: list[str], trained: list[str] | None) -> str:
    unknown = set(names) - set(trained or names)
    return f"; it does not know {some(unknown, 5)}" if unknown else ""


def check_class_map(model: nn.Module, dataset: Dataset) -> list[str]:
    """As `check_classes`, for indices that come from a class map: it may lack some of the model's classes."""
    names, trained = class_names(dataset), _trained_classes(model)
    if names is None:
        return [str(i) for i in range(model.num_classes)]
    if len(names) > model.num_classes:
        raise DataError(
            f"the class map has {len(names)} classes and the model {model.num_classes}{_unknown(names, trained)}"
        )
    if trained:
        if _unknown(names, trained):
            raise DataError(f"the class map does not fit the model{_unknown(names, trained)}; {_first(trained)}")
        differ = next(((i, name) for i, name in enumerate(names) if trained[i] != name), None)
        if differ is not None:
            raise DataError(
                f"the class map is not in the model's order: '{differ[1]}' is class {differ[0]} of the map and class "
                f"{trained.index(differ[1])} of the model; {_first(trained)}"
            )
    return names + [str(i) for i in range(len(names), model.num_classes)]


def _first(trained: list[str]) -> str:
    more = f", ... ({len(trained)} in all)" if len(trained) > 5 else ""
    return f"the model's classes are, in order, {', '.join(trained[:5])}{more}"
