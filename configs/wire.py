"""All names in the messages between server and sites.

docs/architecture.md lists what each one contains, in which direction it is sent, and where it is
checked.
"""

# Records of a message
WEIGHTS = "weights"  # ArrayRecord: one flat array per task and dtype ("encoder/float32")
ROUND = "round"  # ConfigRecord, server to site: the request
INITIAL = "initial"  # ArrayRecord, server to site: initial values of layers that stay at the sites
SITE = "site"  # ConfigRecord, site to server: description of the site and of its answer
SUMS = "sums"  # MetricRecord, site to server: counts and sums

# Message types: Flower's three, the query with a name of our own
DESCRIBE = "query.describe"
TRAIN = "train"
EVALUATE = "evaluate"

# Keys of ROUND. A site returns the first two in SITE, which identifies the request it answers.
NUMBER = "number"  # number of the round
RUN = "run"  # identity of the run; a resumed run keeps it
SETTINGS = "settings"  # settings of a resumed run, as JSON; Flower's run config may lack some
BEST = "best"  # number of the best round so far; 0: none
LAYOUT = "layout"  # sha256 of the packed weights' layout; both ends build it from the model config
SPLIT = "split"  # split to evaluate on

# Keys of SITE
NAME = "name"  # name of the site
REFUSAL = "refusal"  # reason why the site did not do what was requested; absent if it did
DECLINED = "declined"  # the same, if the reason is the site's policy
CLASSES = "classes"  # images per class; absent for the training images of a private site
WITHHELD = "withheld"  # sums that the site's policy withholds, in words
FINGERPRINT = "fingerprint"  # digest of the site's images, masks and labels
SKIPPED = "skipped"  # rows that the site left out, with reasons
DEVICE = "device"  # device that the site trains on
VERSIONS = "versions"  # versions of the site's software

# Beginning of the error message of a site that has not approved the coordinator's release
UNAPPROVED = "release not approved"

# Keys of SUMS in a training reply
EXAMPLES = "examples"  # training examples of the site
WITH_MASK = "with-mask"  # those with a mask, which weigh the site in the segmentation average
WITH_LABEL = "with-label"  # those with a label, which weigh the site in the classification average
STEPS = "steps"  # optimiser steps
SECONDS = "seconds"  # duration; absent with privacy, since it reveals how many images were drawn
LOSS_SEGMENTATION = "loss-segmentation"  # mean loss; absent with privacy, which would not cover it
LOSS_CLASSIFICATION = "loss-classification"  # likewise
# Privacy spent by the site's cohort so far, including this round; absent without privacy
EPSILON = "epsilon"
DELTA = "delta"
BUDGET = "budget"  # maximum epsilon of the cohort over all runs; absent if the site has no budget

# Splits
TRAIN_SPLIT = "train"
VAL_SPLIT = "val"
TEST_SPLIT = "test"
SPLITS = (TRAIN_SPLIT, VAL_SPLIT, TEST_SPLIT)
