"""The package's public names."""

import importlib
import pkgutil

import pytest

import datastore

MODULES = [name for _, name, _ in pkgutil.iter_modules(datastore.__path__)]


def test_public_names_are_sorted_exist_and_equal_no_module():
    assert datastore.__all__ == sorted(datastore.__all__)
    assert not {*datastore.__all__} & {*MODULES}
    assert {getattr(datastore, name).__name__ for name in dir(datastore)} == {*datastore.__all__}
    with pytest.raises(AttributeError, match="no attribute 'shuffle'"):
        datastore.shuffle  # noqa: B018


@pytest.mark.parametrize("name", MODULES)
def test_every_module_says_what_it_offers(name):
    module = importlib.import_module(f"datastore.{name}")
    assert module.__doc__
    assert module.__all__ == sorted(module.__all__, key=lambda n: (not n.isupper(), n))
    assert all(hasattr(module, public) for public in module.__all__)
