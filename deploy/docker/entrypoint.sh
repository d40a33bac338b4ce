#!/bin/sh
# Start tritonserver with the APIs closed that no client of this backend needs: shared memory,
# tracing and logging. They answer only requests with the header `inplace-admin: $ADMIN_KEY`;
# without ADMIN_KEY the key is random, and nobody knows it.
set -eu
key=${ADMIN_KEY:-$(od -An -N16 -tx1 /dev/urandom | tr -d ' \n')}
closed=shared-memory,trace,logging
if [ "$(basename "${1:-}")" = tritonserver ]; then
    set -- "$@" "--http-restricted-api=$closed:inplace-admin=$key" "--grpc-restricted-protocol=$closed:inplace-admin=$key"
fi
exec "$@"
