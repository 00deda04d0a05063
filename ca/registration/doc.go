// Package registration is the registration authority: the one procedure through which a request becomes a certificate.
//
// Every door (our gRPC, and later Istio's, Linkerd's, Kubernetes') ends in [Authority.Issue]; read that function, whose
// steps are numbered, and you have read how meshca decides. Whatever it decides leaves a [Decision]: an audit line, and
// a place in the [Ring] that `certctl explain` asks.
//
// An agent gets its own SVID through [Authority.AttestAgent]. It holds no power of its own: for each workload it shows
// that workload's token, and the pod must run on the agent's node, by UID.
package registration
