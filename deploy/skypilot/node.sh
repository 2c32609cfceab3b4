#!/usr/bin/env bash
# A node on a machine that may be taken away: `node.sh FOLDER`, with TICKET and, if need be, ARGS in the environment.
# Only the node's key is kept in FOLDER (68 bytes; a bucket will do); all else is on the machine's own disk.
#
# SIGTERM, or the cloud's notice that the machine is going (2 minutes before on AWS, 30 s on GCP): the node leaves.
set -uo pipefail

kept=$1
state=${STATE:-$HOME/thinwire-state}
metadata=${METADATA:-http://169.254.169.254}
mkdir -p "$kept" "$state"
[ -s "$state/identity.key" ] || cp "$kept/identity.key" "$state/identity.key" 2>/dev/null
[ -e "$state/identity.key" ] && chmod 600 "$state/identity.key"

ask() { curl --silent --fail --max-time 2 --noproxy '*' "$@"; }
google() { ask --header 'Metadata-Flavor: Google' "$metadata/computeMetadata/v1/instance/$1"; }
amazon() {
  local token
  token=$(ask --request PUT --header 'X-aws-ec2-metadata-token-ttl-seconds: 60' "$metadata/latest/api/token") || return
  ask --header "X-aws-ec2-metadata-token: $token" "$metadata/latest/meta-data/$1"
}

# Where other nodes reach this one, for payloads and snapshots.
address=$(google network-interfaces/0/access-configs/0/external-ip || amazon public-ipv4)
announce=()
[ -n "$address" ] && announce=(--announce "$address:4002")

# shellcheck disable=SC2086 # ARGS are several words
thinwire join - --state "$state" --port 4002 "${announce[@]}" ${ARGS:-} <<<"$TICKET" &
node=$!
trap 'kill -TERM "$node" 2>/dev/null' TERM INT

is_going() { [ "$(google preempted)" = TRUE ] || amazon spot/instance-action >/dev/null; }
watch() {
  until [ -s "$state/identity.key" ]; do sleep 1; done
  cmp --silent "$state/identity.key" "$kept/identity.key" || cp "$state/identity.key" "$kept/identity.key"
  until is_going; do sleep 5; done
  echo "this machine is being taken away: leaving the swarm" >&2
  kill -TERM "$node"
}
watch &
watcher=$!

# A signal ends `wait`, not the node: wait again until it has left.
while :; do
  wait "$node"
  code=$?
  kill -0 "$node" 2>/dev/null || break
done
kill "$watcher" 2>/dev/null
exit "$code"
