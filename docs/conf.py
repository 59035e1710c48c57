"""Configuration of Sphinx; build with ``sphinx-build -W -b html docs docs/_build/html``."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))

import generate

import sersicnet

generate.write(Path(__file__).parent / "_generated")

project = "sersicnet"
author = "The sersicnet developers"
release = version = sersicnet.__version__

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.mathjax", "numpydoc"]
exclude_patterns = ["_build", "_generated", "jupyter_execute"]  # the generated pages are included in reference.md

nb_execution_mode = "force"  # the notebooks are committed without their outputs
nb_execution_excludepatterns = ["hst.ipynb"]  # apart from that of a real field, whose image is not in the repository
nb_execution_raise_on_error = True
nb_execution_timeout = 300
nb_execution_show_tb = True

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3

default_role = "py:obj"
smartquotes = False  # they would turn --option into a dash
autodoc_mock_imports = ["keras"]  # TensorFlow takes long to import and is not needed here
autodoc_typehints = "none"  # the docstrings state types
autodoc_preserve_defaults = True
numpydoc_show_class_members = False

html_theme = "furo"
html_title = f"sersicnet {release}"
