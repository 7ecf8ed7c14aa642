# SPDX-License-Identifier: MIT
"""The classes of a model: their names, and whether those of a dataset are the same, in the same order."""

from torch import nn

from ...data.datasets import MapDataset, class_difference, class_names
from ...data.images import DataError
from ...errors import list_some
from ...models.attributes import num_classes, pretrained_cfg


def check_classes(model: nn.Module, dataset: MapDataset) -> list[str]:
    """The names of the model's classes.

    Raises:
        DataError: The dataset's classes are not the model's.
    """
    names, count = class_names(dataset), num_classes(model)
    if names is None:
        return [str(i) for i in range(count)]
    trained = _trained_classes(model)
    if len(names) > count:
        raise DataError(f"the dataset has {len(names)} classes and the model {count}{_unknown(names, trained)}")
    if trained and trained != names:
        there, here = next((a, b) for a, b in zip([*trained, None], [*names, None]) if a != b)
        raise DataError(
            f"the dataset's classes are not those that the model was trained on ('{here}' here, '{there}' there; "
            f"{class_difference(names, trained)}): pass a class map"
        )
    if len(names) < count:
        raise DataError(
            f"the dataset has {len(names)} classes and the model {count}, so their indices may differ: pass a class "
            f"map (a file with one class per line, in the model's order), or name the dataset with --variant if it is "
            f"one of ImageNet's"
        )
    return names


def check_class_map(model: nn.Module, dataset: MapDataset) -> list[str]:
    """As `check_classes`, for indices that come from a class map, which may lack some of the model's classes."""
    names, trained, count = class_names(dataset), _trained_classes(model), num_classes(model)
    if names is None:
        return [str(i) for i in range(count)]
    if len(names) > count:
        raise DataError(f"the class map has {len(names)} classes and the model {count}{_unknown(names, trained)}")
    if trained:
        if _unknown(names, trained):
            raise DataError(f"the class map does not fit the model{_unknown(names, trained)}; {_describe(trained)}")
        misplaced = next(((i, name) for i, name in enumerate(names) if trained[i] != name), None)
        if misplaced is not None:
            index, name = misplaced
            raise DataError(
                f"the class map is not in the model's order: '{name}' is class {index} of the map and class "
                f"{trained.index(name)} of the model; {_describe(trained)}"
            )
    return names + [str(i) for i in range(len(names), count)]


def _trained_classes(model: nn.Module) -> list[str] | None:
    """The classes that were stored with the weights, in the order of the outputs."""
    trained = pretrained_cfg(model).get("label_names")
    return list(trained) if trained and len(trained) == num_classes(model) else None


def _unknown(names: list[str], trained: list[str] | None) -> str:
    unknown = set(names) - set(trained or names)
    return f"; the model does not know {list_some(unknown, 5)}" if unknown else ""


def _describe(trained: list[str]) -> str:
    more = f", ... ({len(trained)} in total)" if len(trained) > 5 else ""
    return f"the model's classes are, in order, {', '.join(trained[:5])}{more}"
