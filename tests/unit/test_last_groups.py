"""What was said at meetings: the newest groups' values stay, whatever comes late."""

from __future__ import annotations

from raytrain_het.membership.last_groups import LastGroups


def test_late_words_of_older_groups_push_out_nothing() -> None:
    groups: LastGroups[bytes] = LastGroups()
    assert groups.keep("1.3", "0", b"now")
    assert groups.keep("1.1", "0", b"late")
    assert groups.keep("1.2", "0", b"late too")
    assert not groups.keep("1.1", "1", b"later still")
    assert groups.of("1.3") == {"0": b"now"}
    assert list(groups) == [("1.3", "0", b"now"), ("1.2", "0", b"late too")]


def test_a_newer_group_pushes_out_the_oldest() -> None:
    groups: LastGroups[int] = LastGroups()
    for group in ("1.8", "1.9", "1.10"):
        groups.keep(group, "key", 1)
    assert [group for group, _, _ in groups] == ["1.9", "1.10"]


def test_numbers_tell_which_is_newer_though_a_restarted_actors_clock_was_set_back() -> None:
    groups: LastGroups[int] = LastGroups()
    for group in ("200.5", "200.6", "100.7"):
        groups.keep(group, "key", 1)
    assert groups.of("100.7") == {"key": 1}
    assert groups.of("200.5") == {}
