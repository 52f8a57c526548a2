"""The version of the package; pyproject.toml and every manifest take it from here."""

__version__ = "0.2.0.dev0"
