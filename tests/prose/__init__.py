"""The prose check of ``make lint``: plain technical English in docs, docstrings, help and errors.

``python -m tests.prose`` prints one line per finding and exits with 1 if there is any;
``python -m tests.prose --count`` prints the dialect words per 10,000 words in each category.
"""
