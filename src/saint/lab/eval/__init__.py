"""Accuracy of base and pruned models on the same samples, compared in pairs; also without labels."""

from ..sources.items import Failure as Failure
from ..sources.items import Item as Item
from ..sources.questions import Question as Question
from ..sources.questions import read_questions as read_questions
from ..sources.samples import Samples as Samples
from ..sources.samples import find_samples as find_samples
from .compare import Paired as Paired
from .compare import compare as compare
from .images import evaluate_images as evaluate_images
from .journal import Journal as Journal
from .journal import JournalError as JournalError
from .report import Report as Report
from .report import Summary as Summary
from .vqa import evaluate_vqa as evaluate_vqa
