"""Every name that crosses the wire between server and site, once.

docs/architecture.md has the table of what each carries, in which direction, and where it is
checked.
"""

# Records of a message
WEIGHTS = "weights"  # ArrayRecord: one flat array per task and dtype ("encoder/float32")
ROUND = "round"  # ConfigRecord, server to site: what is asked
INITIAL = "initial"  # ArrayRecord, server to site: first values of what stays at the sites
SITE = "site"  # ConfigRecord, site to server: who answers
SUMS = "sums"  # MetricRecord, site to server: what was counted

# Kinds of message: Flower's own three, the query with a name of ours
DESCRIBE = "query.describe"
TRAIN = "train"
EVALUATE = "evaluate"

# ROUND; the first two come back in SITE, so that a reply says what it is a reply to
NUMBER = "number"
RUN = "run"  # identity of the run, the same when it is resumed
SETTINGS = "settings"  # of a resumed run, as JSON: Flower's run config has not all of them
BEST = "best"  # the round whose model is the best so far; 0 if there is none
LAYOUT = "layout"  # sha256 of the packed weights' layout; both ends build it from the model config
SPLIT = "split"

# SITE
NAME = "name"
REFUSAL = "refusal"  # why a site will not or cannot do what was asked; absent when it did
DECLINED = "declined"  # the same, where it is the site's own rules that say no
CLASSES = "classes"  # absent for the training images of a site that trains privately
WITHHELD = "withheld"  # what a site's policy keeps out of its sums, in words
FINGERPRINT = "fingerprint"
SKIPPED = "skipped"
DEVICE = "device"
VERSIONS = "versions"

# How the reason of a site's error begins that does not run what the coordinator shipped
UNAPPROVED = "release not approved"

# SUMS of a training reply
EXAMPLES = "examples"  # each counts the site's training examples; a task's average is
WITH_MASK = "with-mask"  # weighted by the examples that carry its annotation
WITH_LABEL = "with-label"
STEPS = "steps"
SECONDS = "seconds"  # of a round with privacy absent, as they tell how many images it drew
LOSS_SEGMENTATION = "loss-segmentation"  # absent with privacy, which they would not have
LOSS_CLASSIFICATION = "loss-classification"
# DpEvent by the site's cohort so far, this round included; absent without privacy
EPSILON = "epsilon"
DELTA = "delta"
BUDGET = "budget"  # the most that the cohort may ever spend; absent of a site that has no such rule

# Splits
TRAIN_SPLIT = "train"
VAL_SPLIT = "val"
TEST_SPLIT = "test"
SPLITS = (TRAIN_SPLIT, VAL_SPLIT, TEST_SPLIT)
