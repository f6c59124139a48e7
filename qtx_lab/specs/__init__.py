"""Specs say what to do: frozen and checked, they travel as YAML, notebook parameters, forms and flags."""
