"""`python -m elastiq.cli`."""

from . import main

main()
