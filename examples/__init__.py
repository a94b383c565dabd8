"""Programs to copy. This file is here because a library (Opacus) installs a package of the same name."""
