"""pytest explains the assertions of tests.support too."""

import pytest

pytest.register_assert_rewrite("tests.support")
