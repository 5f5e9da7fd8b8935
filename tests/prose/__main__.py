"""Run the prose check."""

from tests.prose.check import main

main()
