# What meshca may do in Vault, and no more. The PKI mount is called pki_mesh here; it holds issuers for meshca alone.
#
# A rule with "+" stands for every issuer of the mount, so that a successor of the root needs no new policy. To allow one
# issuer alone, write its issuer_id in place of the "+". meshca lists others of the mount then as such that it may not read.

# Which issuers there are, their chains and what they may be used for.
path "pki_mesh/issuers" {
  capabilities = ["list"]
}
path "pki_mesh/issuer/+" {
  capabilities = ["read"]
}

# The one thing that uses a key: an intermediate for each replica of meshca, every 36 hours and at each start.
path "pki_mesh/issuer/+/sign-intermediate" {
  capabilities = ["update"]
}

# Its own login: how long it lasts, to extend it, to give it back.
path "auth/token/lookup-self" {
  capabilities = ["read"]
}
path "auth/token/renew-self" {
  capabilities = ["update"]
}
path "auth/token/revoke-self" {
  capabilities = ["update"]
}

# What of all this is missing, for `meshca config check --live`.
path "sys/capabilities-self" {
  capabilities = ["update"]
}
