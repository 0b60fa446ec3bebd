"""One target with prompts and a cache, on which the tests of this folder train new families."""

import pytest
from own_data import OwnData, write_own_data


@pytest.fixture(scope="session")
def own_data(tmp_path_factory: pytest.TempPathFactory) -> OwnData:
    """No test writes into its folders."""
    return write_own_data(tmp_path_factory.mktemp("own_data"))
