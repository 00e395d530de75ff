"""Contents of a private broker: virtual hosts and users, changed by Erlang expressions inside it."""

from urllib.parse import quote

HOST = "127.0.0.1"
USER = "sl_queue"


class Contents:
    """Contents of a private broker, changed by Erlang expressions. Mutable: it remembers its virtual hosts."""

    port: int
    _password: str
    _vhosts: list[str]

    def url(self, vhost: str = "/") -> str:
        """Return a client's URL of that virtual host, which is made if it is not there."""
        if vhost not in self._vhosts:
            self.evaluate(adding_vhost(vhost))
            self._vhosts.append(vhost)
        return f"amqp://{USER}:{self._password}@{HOST}:{self.port}/{quote(vhost, safe='')}"

    def delete_vhost(self, vhost: str) -> None:
        """Remove a virtual host with all its queues."""
        self._vhosts.remove(vhost)
        self.evaluate(deleting_vhost(vhost))

    def add_user(self, name: str, password: str, vhost: str, configure: str, write: str, read: str) -> None:
        """Add a user with these rights (regular expressions of names) on a virtual host."""
        self.evaluate(adding_user(name, password, vhost, configure, write, read))

    def evaluate(self, expression: str) -> str:
        """Return the value of an Erlang expression inside the broker, as text."""
        raise NotImplementedError

    def _restore_vhosts(self) -> None:
        """Restore the virtual hosts after a start, perhaps without the data of before."""
        for vhost in self._vhosts[1:]:
            self.evaluate(adding_vhost(vhost))


def binary(text: str) -> str:
    """Return text as an Erlang binary."""
    return "<<" + ",".join(str(byte) for byte in text.encode()) + ">>"


def adding_vhost(vhost: str) -> str:
    """Return the Erlang expression that makes a virtual host, if it is not there, and lets us use it."""
    return f"rabbit_vhost:add({binary(vhost)}, {binary(USER)}), {_permitting(USER, vhost, '.*', '.*', '.*')}"


def deleting_vhost(vhost: str) -> str:
    """Return the Erlang expression that removes a virtual host."""
    return f"rabbit_vhost:delete({binary(vhost)}, {binary(USER)})"


def adding_user(name: str, password: str, vhost: str, configure: str, write: str, read: str) -> str:
    """Return the Erlang expression that makes a user, or changes one that is there."""
    user = f"#{{name => {binary(name)}, password => {binary(password)}, tags => []}}"
    made = f"rabbit_auth_backend_internal:put_user({user}, {binary(USER)})"
    return f"{made}, {_permitting(name, vhost, configure, write, read)}"


def _permitting(user: str, vhost: str, configure: str, write: str, read: str) -> str:
    arguments = ", ".join(binary(text) for text in (user, vhost, configure, write, read, USER))
    return f"rabbit_auth_backend_internal:set_permissions({arguments})"
