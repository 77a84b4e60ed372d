#!/bin/sh
# Turns every NAME_FILE=…/secrets/… of the environment into NAME=<what the file holds>, then becomes the command.
# Other variables that end so (SSL_CERT_FILE) are none of its business.
set -eu
for name in $(env | sed -n 's|^\([A-Z][A-Z0-9_]*\)_FILE=.*/secrets/.*|\1|p'); do
    eval "file=\$${name}_FILE"
    value=$(cat "$file")
    export "$name=$value"
    unset "${name}_FILE"
done
exec "$@"
