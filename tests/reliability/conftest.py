"""One launcher and one set of tiny inputs for all tests here."""

import pytest

from tests.reliability.tiny_runs import Launcher, make_inputs


@pytest.fixture(scope="session")
def launcher():
    started = Launcher()
    yield started
    started.close()


@pytest.fixture(scope="session")
def inputs(tmp_path_factory):
    return make_inputs(tmp_path_factory.mktemp("tiny-inputs"))
