"""All scores by name: logits and activations in, one number per image out, higher = more
in-distribution.

A score is a pure function that returns a (images,) tensor. Its arguments are named after what it
reads and are handed in by name: `logits` (images, classes) of the rectified activations,
`activations` (images, channels) after rectification, `weight` (classes, channels) and `bias`
(classes,) of the linear head, the entry's parameters, and what its `fit` computed.

To add one, write the function and an entry in the dict at the end of the file that it belongs to;
its name is then a method of eval.py, and `RECTIFIER+NAME` too.
"""

from lhact.methods.entries import Score
from lhact.methods.scores_by_class import SCORES_BY_CLASS
from lhact.methods.scores_by_head import SCORES_BY_HEAD
from lhact.methods.scores_by_neighbours import SCORES_BY_NEIGHBOURS
from lhact.methods.scores_by_subspace import SCORES_BY_SUBSPACE
from lhact.methods.scores_of_logits import SCORES_OF_LOGITS

_BY_NAME = {
    **SCORES_OF_LOGITS,
    **SCORES_BY_HEAD,
    **SCORES_BY_NEIGHBOURS,
    **SCORES_BY_SUBSPACE,
    **SCORES_BY_CLASS,
}
# The order in which they are listed and run: these first, then the others as they stand above.
_FIRST = (
    *("msp", "odin", "energy", "maxlogit", "gen", "lts", "dice", "knn", "vim", "residual"),
    *("mahalanobis", "rmds", "nnguide", "fdbd", "neco"),
)
SCORES: dict[str, Score] = {name: _BY_NAME[name] for name in dict.fromkeys((*_FIRST, *_BY_NAME))}
