// Package client speaks to the CA's issuance door, meshca.v1.IssuanceService.
//
// A [Client] trusts nobody but `spiffe://<trust domain>/meshca/server`, verified against the trust bundle as it is at
// each handshake; there is no way to make it skip that. It shows the caller's SVID once there is one. [Client.Redial]
// moves new calls to a new connection, made with the identity and the bundle of now, while calls in flight end where
// they began.
package client
