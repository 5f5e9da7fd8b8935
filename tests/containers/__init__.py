"""Images built and containers run by the tests, where no Docker daemon and no hub are to be had."""
