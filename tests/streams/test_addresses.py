"""URLs of servers."""

import pytest

from kimia.errors import SettingsError
from kimia.streams.addresses import Nodes, Sentinels, check_url, nodes, sentinels

pytestmark = pytest.mark.unit


@pytest.mark.parametrize("url", ["redis://host:6379/0", "rediss://:secret@host/1", "unix:///run/redis.sock"])
def test_a_server_is_named_itself(url):
    assert sentinels(url) is None
    assert nodes(url) is None


def test_a_cluster_is_named_by_some_of_its_nodes():
    assert nodes("redis+cluster://a") == Nodes("redis://a:6379", ())
    found = nodes("rediss+cluster://me:p%40ss@a:1,b,[::1]:3/0?ssl_cert_reqs=none")
    assert found == Nodes("rediss://me:p%40ss@a:1?ssl_cert_reqs=none", (("b", 6379), ("::1", 3)))
    assert nodes("redis+cluster://[::1]:3/").first == "redis://[::1]:3"
    assert "p%40ss" not in repr(found)
    check_url("redis+cluster://a:1,b:2")


def test_sentinels_name_a_service():
    assert sentinels("redis+sentinel://a:1,b,[::1]:3/calls") == Sentinels((("a", 1), ("b", 26379), ("::1", 3)), "calls")
    found = sentinels("redis+sentinel://me:p%40ss@a:1/calls/2")
    assert (found.username, found.password, found.database) == ("me", "p@ss", 2)
    assert sentinels("redis+sentinel://:secret@a/calls").username is None
    assert "secret" not in repr(sentinels("redis+sentinel://:secret@a/calls"))


@pytest.mark.parametrize(
    ("url", "rule"),
    [
        ("", "no Redis URL"),
        ("http://secret", "no Redis URL"),
        ("redis://", "no Redis URL"),
        ("redis://[secret", "no Redis URL"),
        ("redis+cluster:///secret", "no URL of a cluster"),
        ("redis+cluster://a:1/2?x=secret", "one database"),
        ("redis+cluster://a:secret", "host:port"),
        ("redis+cluster://secret:1,,b", "host:port"),
        ("redis+sentinel://secret:1", "no Sentinel URL"),
        ("redis+sentinel:///secret", "no Sentinel URL"),
        ("redis+sentinel://a:1/secret/x", "no Sentinel URL"),
        ("redis+sentinel://a:secret/calls", "host:port"),
        ("redis+sentinel://a:1,,b/calls", "host:port"),
    ],
)
def test_what_names_no_server_is_refused_and_not_shown(url, rule):
    with pytest.raises(SettingsError, match=rule) as caught:
        check_url(url)
    assert "secret" not in str(caught.value)
