#!/bin/sh
# Makes the secrets of compose.yaml and of ../kubernetes, new random ones, in a folder that does not
# exist yet (default: secrets, beside this script):
#
#   redis_credentials        user:password, for VLCACHE_REDIS_CREDENTIALS_FILE
#   users.acl                the same user for Redis, which gets to know a hash only
#   grafana_admin_password
#
# Compose mounts each file with the mode it has here, and the containers run under other users: the
# files can be read by all, the folder around them by its owner only.
set -eu

folder=${1:-$(dirname "$0")/secrets}

random() {
    head -c 32 /dev/urandom | od -An -v -tx1 | tr -d ' \n'
}

umask 022
mkdir -m 700 "$folder"
password=$(random)
hash=$(printf %s "$password" | sha256sum | cut -d ' ' -f 1)
printf 'vlcache:%s\n' "$password" >"$folder/redis_credentials"
# What VLCache's tier and its command line call, on its own keys only. "health" may ask whether
# Redis is there, and nothing else: checks need no secret.
cat >"$folder/users.acl" <<ACL
user default off
user health on nopass resetkeys resetchannels -@all +ping
user vlcache on #$hash resetkeys ~vlcache* resetchannels -@all +ping +client|setinfo +info +get +set +exists +del +getrange +strlen +pttl +scan +unlink
ACL
random >"$folder/grafana_admin_password"
echo "Secrets are in $folder"
