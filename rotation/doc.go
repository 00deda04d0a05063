// Package rotation decides when credentials are replaced, and in which order. It knows nothing of certificates.
//
//   - [Schedule] is a pure function: when, in the life of a credential, its successor is due.
//   - [Keep] is the one loop of meshca: a workload's SVID, the agent's own, the CA's serving certificate and its
//     intermediate are each a [Subject] that it keeps fresh.
//   - [Current] is the one subscription idiom: a value, and a channel that closes when it is stale.
package rotation
