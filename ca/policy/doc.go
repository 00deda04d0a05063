// Package policy decides which service account gets which SVID. It is pure: no clock, no network, no file.
//
// A policy is a YAML document of rules. They are read in order and the first that matches decides:
//
//	rules:
//	  - name: no-system            # for people: refusals and `certctl policy test` say it; optional, unique
//	    namespaces: [kube-*]       # names, or globs with *; left out: all
//	    deny: system pods have no business in the mesh   # or true
//	  - name: payments
//	    clusters: [prod]           # left out: all
//	    namespaces: [payments]
//	    serviceAccounts: [api, worker-*]
//	    when: pod.labels.tier == "gold"    # a condition in CEL; left out: none
//	    id: /pay/{serviceAccount}  # a path, or spiffe://<this trust domain>/path; left out: /ns/{namespace}/sa/{serviceAccount}
//	    ttl: 1h                    # left out: the CA's maximum
//	    dnsNames: ["{serviceAccount}.{namespace}.svc"]    # left out: none
//	    direct: true               # the workload may call the CA itself; left out: false, as the two below
//	    nodeVouched: true          # an agent may ask for the pod without its token
//	    serverKeys: true           # the CA's own SDS door may make the key: there is no such door yet, so without effect
//
// `rules: []` means the plain ID, spiffe://<trust domain>/ns/<namespace>/sa/<service account>, for all. Where there are
// rules and none matches, nothing is issued (POLICY_NO_RULE).
//
// An ID template knows {cluster}, {namespace} and {serviceAccount} and nothing else: labels and annotations can be
// changed by whoever owns the pod. A path segment holds one of them at most, so that two accounts never meet in one ID
// by a shift of the border between two names. The labels of DNS names are made in the same way.
//
// Conditions ask for names, labels and annotations (see [Input]). They are type-checked and bounded in cost when the
// document is read, and compiled once. One that errs refuses, and what is not known is neither true nor false: see
// [Policy.Decide].
package policy
