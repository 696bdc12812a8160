"""Every public name has a type that users' checkers see, and a docstring that people read."""

import inspect

import pytest

import fiducial as fd

NAMES = [name for name in fd.__all__ if name != "__version__"]


def functions():
    """Every public function, of the package itself and of its public modules."""
    for name in NAMES:
        value = getattr(fd, name)
        if inspect.isfunction(value):
            yield name, value
        elif inspect.ismodule(value):
            for key in getattr(value, "__all__", dir(value)):
                inner = getattr(value, key)
                if inspect.isfunction(inner) and not key.startswith("_"):
                    yield f"{name}.{key}", inner


@pytest.mark.parametrize(("name", "function"), list(functions()))
def test_a_public_function_says_what_it_takes_and_returns(name, function):
    signature = inspect.signature(function)
    assert signature.return_annotation not in (inspect.Signature.empty, "Any"), name
    for parameter in signature.parameters.values():
        assert parameter.annotation not in (inspect.Parameter.empty, "Any"), (name, parameter)


@pytest.mark.parametrize("name", NAMES)
def test_a_public_name_is_documented(name):
    value = getattr(fd, name)
    doc = inspect.getdoc(value) or ""
    assert len(doc.split()) >= 4, name
    if inspect.isclass(value):
        methods = {k: v for k, v in vars(value).items() if not k.startswith("_")}
        for key, method in methods.items():
            if inspect.isfunction(method) and method.__module__.startswith("fiducial"):
                assert inspect.getdoc(method), f"{name}.{key}"
    if inspect.ismodule(value):
        for key in getattr(value, "__all__", dir(value)):
            inner = getattr(value, key)
            if inspect.isfunction(inner) and not key.startswith("_"):
                assert inspect.getdoc(inner), f"{name}.{key}"
