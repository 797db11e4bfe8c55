"""Tests of what is said of processes."""

from edgemerge.machine.process import wait_briefly


def test_threads_wait_briefly() -> None:
    environment: dict[str, str] = {}
    wait_briefly(environment)
    assert int(environment["GOMP_SPINCOUNT"]) <= 10_000
    assert environment["OMP_WAIT_POLICY"] == "PASSIVE"


def test_a_users_own_wish_stands() -> None:
    for wish in ({"OMP_WAIT_POLICY": "ACTIVE"}, {"GOMP_SPINCOUNT": "7"}):
        environment = dict(wish)
        wait_briefly(environment)
        assert environment == wish
