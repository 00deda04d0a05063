// Package vault is an upstream whose roots stay in HashiCorp Vault: a PKI mount signs our intermediates, and the keys of
// its issuers never leave it.
//
//   - [Config] is the manual of the `upstream.vault` piece of the configuration.
//   - [Upstream] lists the mount's issuers and has one of them sign, each by its issuer_id: names, and the mount's default
//     issuer, can be moved to another key by whoever administers Vault.
//   - [Upstream.Run] keeps the login and looks at the issuers; without it each call still logs in by itself.
//   - [Upstream.Check] is what `meshca config check --live` prints: what is wrong between us and Vault, and what to do.
//
// A signing is sent once. Vault answers 403 before it does anything, so after that answer, and no other one, a call is
// made again under a fresh login. Whatever the mount answers is checked by package ca before it is used.
package vault
