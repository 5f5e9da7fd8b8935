"""One local round of training and one evaluation."""
