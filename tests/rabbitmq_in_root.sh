#!/bin/sh
# The RabbitMQ of an image for tests that start a rabbitmq-server: copy this file into the image's root file system.
#   docker create --name rabbitmq-4 rabbitmq:4.0-management && mkdir root && docker export rabbitmq-4 | tar -x -C root
#   cp tests/rabbitmq_in_root.sh root/ && export SL_QUEUE_RABBITMQ_SERVER=$PWD/root/rabbitmq_in_root.sh
# Needs root. Data, configuration and certificates lie below /tmp, which both see; the mounts end with the server.
set -eu
export PATH=/usr/lib/rabbitmq/bin:/opt/rabbitmq/sbin:/opt/erlang/bin:/usr/sbin:/usr/bin:/sbin:/bin
exec unshare --mount sh -c '
  cd "$1" && mount --rbind /tmp tmp && mount --rbind /dev dev && mount -t proc proc proc || exit 1
  exec chroot . rabbitmq-server' sh "$(dirname "$(readlink -f "$0")")"
