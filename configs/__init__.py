"""Configs that ship with the package: --config=NAME finds NAME.py here."""
