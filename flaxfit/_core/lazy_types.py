"""Type checks against libraries that may not be imported."""


def comes_from(value: object, package: str, *names: str) -> bool:
    """Whether a value is an instance of a package's class, without importing it.

    Args:
      value: anything.
      package: the name of the package: `"torch"`.
      names: the names of the classes: `"DataLoader"`.
    """
    return any(
        cls.__module__.split(".")[0] == package and cls.__name__ in names
        for cls in type(value).__mro__
    )
