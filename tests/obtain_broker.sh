#!/bin/sh
# Make sure that the tests find a RabbitMQ: they start a private one, and never touch one that is already there.
set -eu

if [ -n "${SL_QUEUE_TEST_BROKER:-}" ]; then
  echo "tests use the broker of SL_QUEUE_TEST_BROKER"
  exit 0
fi
if [ -x /usr/lib/rabbitmq/bin/rabbitmq-server ] || command -v rabbitmq-server >/dev/null 2>&1; then
  exit 0
fi

root=""
if [ "$(id -u)" -ne 0 ]; then
  if sudo -n true 2>/dev/null; then root="sudo -n"; else root="no"; fi
fi
if command -v apt-get >/dev/null 2>&1 && [ "$root" != no ]; then
  echo "installing Debian's rabbitmq-server (its system service is not started)"
  policy=/usr/sbin/policy-rc.d
  made=no
  if [ ! -e "$policy" ]; then
    made=yes
    printf '#!/bin/sh\nexit 101\n' | $root tee "$policy" >/dev/null && $root chmod +x "$policy"
  fi
  installed=no
  if $root apt-get update -qq && $root env DEBIAN_FRONTEND=noninteractive \
    apt-get install -y -qq --no-install-recommends rabbitmq-server >/dev/null; then installed=yes; fi
  if [ "$made" = yes ]; then $root rm -f "$policy"; fi
  if [ "$installed" = yes ]; then exit 0; fi
fi

if command -v docker >/dev/null 2>&1 && docker info >/dev/null 2>&1; then
  exit 0
fi

cat >&2 <<'TXT'
The tests need a RabbitMQ, and none can be had here. Any one of these four will do:
  1. SL_QUEUE_TEST_BROKER=amqp://user:password@host:5672/vhost, a broker that the tests may use freely
  2. a rabbitmq-server on this machine: the tests start a private one on a free port
  3. Debian's package: run `make test` as root or with sudo, or `apt-get install rabbitmq-server`
  4. Docker: a running engine that can pull rabbitmq:4-management
TXT
exit 1
