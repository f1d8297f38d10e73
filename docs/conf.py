"""The guide as a site: `make docs`."""

import dynnet

project = "dynnet"
author = "the dynnet authors"
release = dynnet.__version__
html_title = f"dynnet {release}"

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
html_theme = "furo"
default_role = "code"  # docstrings write names in single backticks
html_static_path = ["images"]

myst_heading_anchors = 3
nb_execution_mode = "off"  # a test runs the notebook; the site shows what it printed when it was saved
autodoc_member_order = "bysource"
autodoc_typehints = "none"  # docstrings tell shapes and units
napoleon_use_ivar = True
napoleon_use_rtype = False
