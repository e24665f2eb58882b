"""What members say of their replicas is compared, and the first difference named."""

import math

import pytest

from raytrain_het.membership.audit import AuditCollector, difference
from raytrain_het.membership.message_parts import ReplicaAudit
from raytrain_het.membership.protocol import Audit

LIKE, OTHER = "CPU A", "GPU B"


def audit(kind=LIKE, numbers=(("lr of parameter group 0", 0.1),), tensors=(("fc.weight", "ab"),), **samples):
    return ReplicaAudit(kind=kind, numbers=list(numbers), tensors=list(tensors), samples=samples)


def test_the_same_is_no_difference():
    assert difference({0: audit(), 1: audit(), 4: audit()}) is None


def test_who_is_in_the_minority_is_named():
    others = {0: audit(), 2: audit(), 5: audit(tensors=[("fc.weight", "cd")])}
    assert difference(others) == "fc.weight of worker 5 is not that of workers 0 and 2"


def test_where_all_differ_all_are_named():
    others = {0: audit(), 1: audit(tensors=[("fc.weight", "cd")])}
    assert difference(others) == "fc.weight is another one on each of workers 0 and 1"


def test_a_tensor_that_one_member_lacks_is_named():
    assert difference({0: audit(), 1: audit(tensors=())}) == "fc.weight is not there on worker 1"


def test_a_number_is_told_with_its_values():
    others = {0: audit(), 1: audit(numbers=[("lr of parameter group 0", 0.2)])}
    assert difference(others) == "lr of parameter group 0 is 0.1 on worker 0, 0.2 on worker 1"


def test_not_a_number_is_the_same_as_not_a_number():
    numbers = [("best", math.nan)]
    assert difference({0: audit(numbers=numbers), 1: audit(numbers=numbers)}) is None


def test_unlike_machines_may_round_rates_and_like_ones_not():
    near = [("lr of parameter group 0", 0.1 * (1 + 1e-15))]
    assert difference({0: audit(), 1: audit(kind=OTHER, numbers=near)}) is None
    assert difference({0: audit(), 1: audit(numbers=near)}) is not None


@pytest.mark.parametrize(
    ("off", "moved", "found"),
    [
        (1e-7, 0.0, False),  # rounding, of values of about 1
        (1e-4, 0.01, False),  # a hundredth of what updates have changed
        (0.01, 0.01, True),  # another update
        (0.01, None, False),  # nothing is known of updates: within a fiftieth of the values
        (0.5, None, True),
        (math.nan, 0.01, True),
    ],
)
def test_unlike_machines_differ_within_a_part_of_the_updates(off, moved, found):
    one = audit(**{"fc.weight": ([1.0, -0.5], moved)})
    two = audit(kind=OTHER, tensors=[("fc.weight", "cd")], **{"fc.weight": ([1.0 + off, -0.5], moved)})
    text = difference({0: one, 3: two})
    assert (text is not None) is found
    assert not found or text.startswith("fc.weight of worker 3 is off by")


def test_an_audit_waits_for_all_members_and_older_ones_are_dropped():
    book = AuditCollector()
    first, second = (Audit(generation=1, step=step, part=0, audit=audit()) for step in (3, 4))
    other = Audit(generation=1, step=4, part=0, audit=audit(tensors=[("fc.weight", "cd")]))
    assert book.add(0, first, [0, 1]) is None
    assert book.add(0, second, [0, 1]) is None
    assert book.add(1, other, [0, 1]) == "fc.weight is another one on each of workers 0 and 1"
    assert book.add(1, first, [1]) is None


def test_what_each_says_once_must_be_the_same():
    book = AuditCollector()
    assert book.claim(0, "the loss", [[12.0, 1.0]]) is None and book.claim(1, "the loss", [[4.0, 1.00001]]) is None
    assert book.claim(2, "the loss", [[2.0, 1.5]]) == "the loss is [[12.0, 1.0]] on worker 0, [[2.0, 1.5]] on worker 2"
