// Package issuance is meshca's own gRPC door: the server of meshca.v1.IssuanceService.
//
// It holds no decision: each item of each call ends in registration.Authority. What stands here is the transport (TLS
// with an optional client certificate, [Credentials]), the bounds for peers ([Limits]), and the translation of
// messages. The client is the subpackage's.
package issuance
