package refusal

import (
	"maps"
	"slices"

	"google.golang.org/grpc/codes"
)

// The token, as it was presented.
const (
	TokenMissing           Reason = "TOKEN_MISSING"
	TokenTooLarge          Reason = "TOKEN_TOO_LARGE"
	TokenMalformed         Reason = "TOKEN_MALFORMED"
	TokenEncrypted         Reason = "TOKEN_ENCRYPTED"
	TokenAlgorithm         Reason = "TOKEN_ALGORITHM"
	TokenKeyUnknown        Reason = "TOKEN_KEY_UNKNOWN"
	TokenSignature         Reason = "TOKEN_SIGNATURE"
	TokenRejected          Reason = "TOKEN_REJECTED"
	TokenIssuer            Reason = "TOKEN_ISSUER"
	TokenAudience          Reason = "TOKEN_AUDIENCE"
	TokenExpired           Reason = "TOKEN_EXPIRED"
	TokenNoExpiry          Reason = "TOKEN_NO_EXPIRY"
	TokenNotYetValid       Reason = "TOKEN_NOT_YET_VALID"
	TokenTooOld            Reason = "TOKEN_TOO_OLD"
	TokenUnbound           Reason = "TOKEN_UNBOUND"
	TokenNotServiceAccount Reason = "TOKEN_NOT_SERVICE_ACCOUNT"
	TokenUnreadable        Reason = "TOKEN_UNREADABLE"
)

// What the token stands for, as it is now.
const (
	PodGone            Reason = "POD_GONE"
	PodRecreated       Reason = "POD_RECREATED"
	PodFinished        Reason = "POD_FINISHED"
	PodNotOnNode       Reason = "POD_NOT_ON_NODE"
	NodeGone           Reason = "NODE_GONE"
	NodeUnknown        Reason = "NODE_UNKNOWN"
	ServiceAccountGone Reason = "SERVICE_ACCOUNT_GONE"
	NamespaceGone      Reason = "NAMESPACE_GONE"
	ClusterUnknown     Reason = "CLUSTER_UNKNOWN"
	ClusterMismatch    Reason = "CLUSTER_MISMATCH"
	ClaimUntrue        Reason = "CLAIM_UNTRUE"
)

// Who calls.
const (
	AgentNotListed   Reason = "AGENT_NOT_LISTED"
	AgentRequired    Reason = "AGENT_REQUIRED"
	AgentUnknown     Reason = "AGENT_UNKNOWN"
	AgentExpired     Reason = "AGENT_EXPIRED"
	CallerUntrusted  Reason = "CALLER_UNTRUSTED"
	DirectNotAllowed Reason = "DIRECT_NOT_ALLOWED"
)

// What policy says.
const (
	PolicyNoRule     Reason = "POLICY_NO_RULE"
	PolicyDenied     Reason = "POLICY_DENIED"
	PolicyError      Reason = "POLICY_ERROR"
	IdentityDenied   Reason = "IDENTITY_DENIED"
	IdentityInvalid  Reason = "IDENTITY_INVALID"
	IdentityReserved Reason = "IDENTITY_RESERVED"
	DNSNameInvalid   Reason = "DNS_NAME_INVALID"
	LifeTooShort     Reason = "LIFE_TOO_SHORT"

	PolicyFactsUnknown    Reason = "POLICY_FACTS_UNKNOWN"
	NodeVouchedNotAllowed Reason = "NODE_VOUCHED_NOT_ALLOWED"
)

// The certificate signing request.
const (
	CSRTooLarge  Reason = "CSR_TOO_LARGE"
	CSRMalformed Reason = "CSR_MALFORMED"
	CSRSignature Reason = "CSR_SIGNATURE"
	CSRAsksMore  Reason = "CSR_ASKS_MORE"
	CSRKey       Reason = "CSR_KEY"
	CSRKeyIsCA   Reason = "CSR_KEY_IS_CA"
)

// The request as a whole, and limits.
const (
	RequestMalformed Reason = "REQUEST_MALFORMED"
	RootTainted      Reason = "ROOT_TAINTED"
	BatchTooLarge    Reason = "BATCH_TOO_LARGE"
	Overloaded       Reason = "OVERLOADED"
	PeerLimit        Reason = "PEER_LIMIT"
	PodLimit         Reason = "POD_LIMIT"
)

// What the CA needs and does not have.
const (
	KubernetesUnavailable Reason = "KUBERNETES_UNAVAILABLE"
	KubernetesForbidden   Reason = "KUBERNETES_FORBIDDEN"
	KubernetesStale       Reason = "KUBERNETES_STALE"
	ClockSkew             Reason = "CLOCK_SKEW"
	KeysUnavailable       Reason = "KEYS_UNAVAILABLE"
	IssuerNotReady        Reason = "ISSUER_NOT_READY"
	IssuerEnding          Reason = "ISSUER_ENDING"
	SignerUnavailable     Reason = "SIGNER_UNAVAILABLE"
	LedgerUnavailable     Reason = "LEDGER_UNAVAILABLE"
	StoreUnavailable      Reason = "STORE_UNAVAILABLE"
	UpstreamUnavailable   Reason = "UPSTREAM_UNAVAILABLE"
	LintFailed            Reason = "LINT_FAILED"
	SignerMismatch        Reason = "SIGNER_MISMATCH"
	CARolledBack          Reason = "CA_ROLLED_BACK"
	BundleHeld            Reason = "BUNDLE_HELD"
	Stopping              Reason = "STOPPING"
	CallEnded             Reason = "CALL_ENDED"
	Internal              Reason = "INTERNAL"
)

// What the agent finds on its own node.
const (
	CAUnreachable   Reason = "CA_UNREACHABLE"
	CAUntrusted     Reason = "CA_UNTRUSTED"
	SVIDExpired     Reason = "SVID_EXPIRED"
	SVIDPending     Reason = "SVID_PENDING"
	SVIDUntrusted   Reason = "SVID_UNTRUSTED"
	SecretUnknown   Reason = "SECRET_UNKNOWN"
	TypeURLUnknown  Reason = "TYPE_URL_UNKNOWN"
	SocketPath      Reason = "SOCKET_PATH"
	SocketInUse     Reason = "SOCKET_IN_USE"
	SocketUnsafeDir Reason = "SOCKET_UNSAFE_DIRECTORY"
	PeerUnknown     Reason = "PEER_UNKNOWN"
	PeerNotInPod    Reason = "PEER_NOT_IN_POD"
)

// What the agent finds as CSI driver.
const (
	VolumeInvalid       Reason = "VOLUME_INVALID"
	VolumeTaken         Reason = "VOLUME_TAKEN"
	VolumeReplaced      Reason = "VOLUME_REPLACED"
	MountFailed         Reason = "MOUNT_FAILED"
	KubeletUnregistered Reason = "KUBELET_UNREGISTERED"
)

type entry struct {
	code     codes.Code
	what, do string
}

// All returns every reason in alphabetical order.
func All() []Reason { return slices.Sorted(maps.Keys(table)) }

var table = map[Reason]entry{
	TokenMissing: {codes.Unauthenticated,
		"The request carries no service-account token.",
		"Project a token with audience `meshca` into the pod and name its path in the agent's configuration."},
	TokenTooLarge: {codes.InvalidArgument,
		"The token is larger than 16 KiB, which no API server issues.",
		"Check what the token file holds: it must be one service-account token and nothing else."},
	TokenMalformed: {codes.Unauthenticated,
		"The token is not a signed JWT in compact form.",
		"Check what the token file holds: it must be one service-account token as the kubelet writes it."},
	TokenEncrypted: {codes.Unauthenticated,
		"The token is an encrypted JWT (JWE); service-account tokens are signed, not encrypted.",
		"Use the projected service-account token of the pod."},
	TokenAlgorithm: {codes.Unauthenticated,
		"The token's signature algorithm is not one that an API server signs with (RS256, RS384, RS512, ES256, ES384, ES512).",
		"Use the projected service-account token of the pod; `none` and shared-key algorithms are never accepted."},
	TokenKeyUnknown: {codes.Unauthenticated,
		"The token was signed with a key that is not among the cluster's published keys, also after they were read again.",
		"Check that the request names the right cluster, and that the configured JWKS belongs to it: `certctl status` shows the key ids."},
	TokenSignature: {codes.Unauthenticated,
		"The token's signature does not verify under the cluster's key.",
		"The token was altered or made up. Find out who presented it: the audit line names the peer."},
	TokenRejected: {codes.Unauthenticated,
		"The cluster's TokenReview did not accept the token.",
		"The detail repeats what the API server said. A token of a deleted pod or account, of another cluster, or past its end looks like this."},
	TokenIssuer: {codes.Unauthenticated,
		"The token's issuer is not the one that the cluster is configured with.",
		"Compare `iss` in the token with the cluster's `issuer` in the configuration (`kubectl get --raw /.well-known/openid-configuration`)."},
	TokenAudience: {codes.Unauthenticated,
		"The token was made for another audience, or for more than the one.",
		"Workload tokens need audience `meshca` and no other, agents' tokens `meshca-agent`: set `audience` in the serviceAccountToken projection."},
	TokenExpired: {codes.Unauthenticated,
		"The token has expired.",
		"The kubelet replaces projected tokens in time, so read the file again at each use; if it is stale itself, look at the kubelet's log and the clocks."},
	TokenNoExpiry: {codes.Unauthenticated,
		"The token has no expiry: it is a legacy token from a Secret.",
		"Use a projected token (serviceAccountToken volume), which is bound to its pod and expires."},
	TokenNotYetValid: {codes.Unauthenticated,
		"The token is not valid yet at the CA's clock.",
		"Compare the clocks of the CA and the cluster's control plane: `certctl check` shows the skew."},
	TokenTooOld: {codes.Unauthenticated,
		"The token was issued longer ago than `maxTokenAge` allows (25 h by default; kubelets replace them by 24 h).",
		"Read the token file again at each use; if the file itself is old, the kubelet does not refresh it: look at its log."},
	TokenUnbound: {codes.Unauthenticated,
		"The token is not bound to a pod, so nothing says where it may be used.",
		"Use a token that the kubelet projected into a pod; `kubectl create token` needs `--bound-object-kind Pod`."},
	TokenNotServiceAccount: {codes.Unauthenticated,
		"The token's subject is not `system:serviceaccount:<namespace>:<name>` with valid names.",
		"Only service-account tokens attest workloads."},
	TokenUnreadable: {codes.Unavailable,
		"The agent cannot read the workload's token file.",
		"Check that the file exists and that the agent may read it: the detail names the path and the fault."},
	PodGone: {codes.PermissionDenied,
		"The pod that the token is bound to no longer exists.",
		"Nothing to do when the pod was deleted. Otherwise the token comes from another cluster of the same name."},
	PodRecreated: {codes.PermissionDenied,
		"A pod of that name exists, but it is another one: its UID is not the token's.",
		"The token belongs to a pod that was replaced; use the new pod's own token."},
	PodFinished: {codes.PermissionDenied,
		"The pod has finished (phase Succeeded or Failed, or its deletion is due).",
		"Finished pods get no identity; if it should still run, ask why it ended: `kubectl describe pod`."},
	PodNotOnNode: {codes.PermissionDenied,
		"The pod does not run on the node whose agent asks.",
		"An agent may ask only for pods of its own node. If you did not move a token yourself, someone uses a stolen one: the audit line names the agent."},
	NodeGone: {codes.PermissionDenied,
		"The node no longer exists, or was replaced by another of the same name (its UID differs).",
		"Restart the agent on the new node; it attests itself anew."},
	NodeUnknown: {codes.PermissionDenied,
		"Neither the token nor the API server says on which node the pod runs.",
		"Give the CA access to pods in the cluster, or use an API server of 1.32 or later, whose tokens carry the node."},
	ServiceAccountGone: {codes.PermissionDenied,
		"The service account was deleted, or deleted and made again (its UID is not the token's).",
		"Restart the pods that use it: their tokens belong to the account that is gone."},
	NamespaceGone: {codes.PermissionDenied,
		"The namespace was deleted or is terminating.",
		"Nothing to do: identities end with their namespace."},
	ClusterUnknown: {codes.PermissionDenied,
		"The CA has no cluster of that name in its configuration.",
		"Set `cluster` in the agent's configuration to a name under `clusters` in the CA's."},
	ClusterMismatch: {codes.PermissionDenied,
		"The request names another cluster than the one that the agent attested to.",
		"Set `cluster` in the agent's configuration and restart it; an agent's SVID binds it to one cluster."},
	ClaimUntrue: {codes.PermissionDenied,
		"The request object says something else of its pod than the cluster does.",
		"Kubelets make such objects from what is so. If none made this one, somebody tries for another's identity: the audit line has the object's UID, the API server's own log who made it."},
	AgentNotListed: {codes.PermissionDenied,
		"The service account is not one of the cluster's agents.",
		"Add it to `agents` of that cluster in the CA's configuration, if it is an agent's."},
	AgentRequired: {codes.Unauthenticated,
		"The call needs an agent's SVID as client certificate.",
		"Call through the node's agent."},
	AgentUnknown: {codes.Unauthenticated,
		"The CA has no record of the agent that this SVID was issued to.",
		"Agents attest themselves anew by themselves when they hear this; if it lasts, the CA's store was replaced."},
	AgentExpired: {codes.Unauthenticated,
		"The agent's SVID has ended while its connection stayed open.",
		"Agents attest themselves anew by themselves; if it lasts, look at the agent's own token and clock."},
	CallerUntrusted: {codes.Unauthenticated,
		"The client certificate does not lead to a root of this trust domain, or is not an SVID.",
		"Check which CA issued it: `certctl svid inspect` shows the chain."},
	DirectNotAllowed: {codes.PermissionDenied,
		"The caller is no agent, and no policy rule allows this identity to call the CA directly.",
		"Call through the node's agent, or grant `direct: true` to this namespace or account."},
	PolicyNoRule: {codes.PermissionDenied,
		"Policy has rules, and none of them matches this service account.",
		"Add a rule that matches it: `certctl policy test NS/SA` shows how each rule was read."},
	PolicyDenied: {codes.PermissionDenied,
		"A policy rule denies this service account.",
		"The detail names the rule. Change it, or put a narrower rule before it."},
	PolicyError: {codes.PermissionDenied,
		"A policy rule could not be evaluated for this workload; a rule that errs refuses, it is not skipped.",
		"The detail names the rule, its condition and what was missing: ask first whether it is there, as in `has(pod.labels.app) && pod.labels.app == \"web\"`, or label the workload."},
	PolicyFactsUnknown: {codes.Unavailable,
		"A policy rule asks for something of the pod, its node or its namespace that is not known now.",
		"The CA reads it at the next try: look at `certctl status` for the cluster's fault if it lasts. `certctl policy test` has flags to say it, such as --label."},
	NodeVouchedNotAllowed: {codes.PermissionDenied,
		"The agent names a pod without showing its token, and no policy rule allows agents to vouch for this pod.",
		"Give the pod a token for audience `meshca`, or grant `nodeVouched: true` to this namespace or account."},
	DNSNameInvalid: {codes.PermissionDenied,
		"What a rule's `dnsNames` yield for this workload is no DNS name.",
		"Give this service account a rule of its own before that one, or change the template: labels have at most 63 bytes and a placeholder stands for one of them."},
	LifeTooShort: {codes.PermissionDenied,
		"What is granted lives shorter than the request's API allows.",
		"A PodCertificateRequest's certificate lives an hour at least: raise `svid.ttl`, or `ttl` in the policy rule that the detail names, or give these pods another way to the CA."},
	IdentityDenied: {codes.PermissionDenied,
		"An operator denied this SPIFFE ID.",
		"`certctl svid allow ID` lifts it; `certctl explain ID` shows who denied it, when and why."},
	IdentityInvalid: {codes.PermissionDenied,
		"What the ID template yields is not a valid SPIFFE ID.",
		"Mend the template: segments may hold letters, digits, dots, dashes and underscores, and the ID at most 2048 bytes."},
	IdentityReserved: {codes.PermissionDenied,
		"The ID would lie under `/meshca/`, which is reserved for the CA and its agents.",
		"Change the rule's ID template so that its first segment cannot be `meshca`."},
	CSRTooLarge: {codes.InvalidArgument,
		"The certificate signing request is larger than 16 KiB.",
		"Send a CSR that holds a public key and, if need be, the granted names."},
	CSRMalformed: {codes.InvalidArgument,
		"The certificate signing request is not one DER-encoded PKCS #10 request.",
		"Send DER, not PEM, without trailing bytes."},
	CSRSignature: {codes.InvalidArgument,
		"The certificate signing request is not signed by the key that it holds, or with an algorithm that is not accepted.",
		"Sign it with the key it holds, under SHA-256 or better."},
	CSRAsksMore: {codes.PermissionDenied,
		"The certificate signing request asks for a name or an extension that policy did not grant.",
		"Leave names out: the CA puts in what is granted. Or grant the DNS name in the policy rule."},
	CSRKey: {codes.InvalidArgument,
		"The key's type or size is not accepted for leaf certificates.",
		"Use ECDSA P-256 or P-384, RSA of 2048, 3072 or 4096 bits, or Ed25519."},
	CSRKeyIsCA: {codes.PermissionDenied,
		"The certificate signing request holds a key of the CA itself.",
		"Make a key of the workload's own. Whoever sent this holds the CA's public key only, or its private key: find out which."},
	RequestMalformed: {codes.InvalidArgument,
		"The request lacks something or holds something that cannot be.",
		"The detail says what is wrong: write that anew if you typed it. If a program sent it, compare the versions of the two sides: `certctl status` shows them."},
	RootTainted: {codes.FailedPrecondition,
		"An operator said that this root is not to be trusted; the CA remembers that for good.",
		"Go to another root, of another key: `certctl ca status` shows what there is. Take the tainted one out of the upstream."},
	BatchTooLarge: {codes.InvalidArgument,
		"The call holds more than 500 requests, or is larger than 4 MiB.",
		"Split it."},
	Overloaded: {codes.ResourceExhausted,
		"The CA has more work in hand than it takes on at once.",
		"Callers back off by themselves; if it lasts, look at `meshca_issue_in_flight` and give the CA more cores. Where the detail is " +
			"about callers without an agent's SVID, see in the audit log at which addresses they are."},
	PeerLimit: {codes.ResourceExhausted,
		"This peer is over one of its limits: calls, bytes, connections, streams or open requests.",
		"Callers back off by themselves; if the load is real, raise the limit that the detail names."},
	PodLimit: {codes.ResourceExhausted,
		"More SVIDs were issued for this pod than renewals of all its volumes take; it keeps what it has.",
		"Look in the audit log for what asks in this pod's name so often (a pod that calls by itself should keep its SVID for half its life). If the load is real, raise `limits.svidsPerPod` in the CA's configuration."},
	KubernetesUnavailable: {codes.Unavailable,
		"The cluster's API server does not answer.",
		"Look at the API server and the network between; `certctl check` shows the last error."},
	KubernetesForbidden: {codes.Unavailable,
		"The cluster's API server does not let the CA ask what it must know.",
		"Give the CA's account the rights of docs/examples/kubernetes-rights.yaml: create tokenreviews; get, list and watch pods, nodes, serviceaccounts and namespaces."},
	KubernetesStale: {codes.Unavailable,
		"The watch on the cluster's objects has been silent beyond `maxStale`, so nobody knows what lives.",
		"Look at the API server and the network between; it resumes by itself."},
	ClockSkew: {codes.Unavailable,
		"The clocks of the CA and of the cluster's API server are too far apart for the API to take what the CA signs.",
		"Set the clocks: `certctl status` shows the skew. Requests that wait are answered then."},
	KeysUnavailable: {codes.Unavailable,
		"The cluster's token keys could not be read, so no token can be verified.",
		"Look at the JWKS source that the detail names; it is read again by itself."},
	IssuerNotReady: {codes.Unavailable,
		"The CA has no intermediate to sign with yet, or its clock was set back and the one it has is not valid yet.",
		"`certctl ca status` shows the last try, and /readyz says what it waits for. Where it is not valid yet, look at the clocks of the CA and of its upstream."},
	IssuerEnding: {codes.Unavailable,
		"The CA's intermediate ends too soon to issue under it, and a new one has not come.",
		"Look at the upstream: `certctl ca status` shows why it does not sign. Agents keep what they have."},
	SignerUnavailable: {codes.Unavailable,
		"The key that the CA signs with does not answer.",
		"Look at the PKCS#11 token that holds it: /readyz and the CA's log say what it said. It resumes by itself."},
	LedgerUnavailable: {codes.Unavailable,
		"The ledger could not be written, and nothing is signed that is not recorded.",
		"Look at the store: a full disk is the usual cause. It resumes by itself."},
	StoreUnavailable: {codes.Unavailable,
		"The CA's store does not answer.",
		"Look at the store: `certctl check` shows the last error."},
	UpstreamUnavailable: {codes.Unavailable,
		"The upstream that signs the CA's intermediate does not answer.",
		"Look at the upstream: `certctl ca status` shows the last error, and until when the CA can sign."},
	LintFailed: {codes.Internal,
		"The certificate that would be signed breaks a rule of SPIFFE or RFC 5280; nothing was signed.",
		"This is a fault in policy or in meshca: the detail names the lint. Report it if policy is not the cause."},
	SignerMismatch: {codes.Internal,
		"What the signer returned is not what it was asked to sign; it was dropped, and the CA is no longer ready.",
		"Treat it as an incident: look at the audit line and at the signer."},
	CARolledBack: {codes.Unavailable,
		"The CA's store is older than what agents have followed: a backup was restored, and denials, roots or orders that came after it are missing. Nothing is issued.",
		"Put what is missing back in (deny again, import roots; docs/operations.md tells how to find it), or restore a newer backup; then `certctl ca accept-rollback` has the CA go on. Agents keep what they have."},
	BundleHeld: {codes.Unavailable,
		"The CA's trust bundle has a root that was tainted: a backup of before was restored. Nobody is told of that bundle.",
		"The CA takes the root out by itself, unless nobody else can sign: /readyz says so, and `certctl ca taint root --issuer REF` brings in another. Agents keep what they have."},
	Stopping: {codes.Unavailable,
		"The CA, or the agent that was asked, is shutting down.",
		"Callers try again by themselves."},
	CallEnded: {codes.Unavailable,
		"The caller went away, or its time ran out, before there was an answer.",
		"Callers try again by themselves. If it lasts, who was asked is slow: of the CA look at `meshca_decision_duration_seconds`, of an agent at its log."},
	Internal: {codes.Internal,
		"A fault inside meshca.",
		"Look at the log of the CA, or of the agent that says it, at that time, and report it."},
	CAUnreachable: {codes.Unavailable,
		"The agent cannot reach the CA; it serves what it has until that ends.",
		"Look at the network to the CA's address and at the CA; `certctl check` on the node shows the last error."},
	CAUntrusted: {codes.Unavailable,
		"What answers at the CA's address does not prove to be this trust domain's CA.",
		"Compare `certctl bundle show` on the node (--agent) and at the CA. An agent trusts no unverified connection; it takes its bundle file where that has the higher sequence, and `certctl check --agent` says when it has not."},
	SVIDExpired: {codes.Unavailable,
		"The workload's SVID ended before a new one could be had.",
		"`certctl explain` at the agent shows what every try was answered."},
	SVIDPending: {codes.Unavailable,
		"The workload's first SVID has not come yet.",
		"`certctl explain` at the agent shows what every try was answered."},
	SVIDUntrusted: {codes.Unavailable,
		"The workload's SVID does not lead to a root of the trust bundle that its agent serves with it, or is not valid yet, so peers refuse it.",
		"The agent renews it within seconds. If that fails, the detail says why: let the agent reach the CA; and if the CA itself signs under another root, compare `certctl bundle show` at the agent (--agent) and at the CA."},
	SecretUnknown: {codes.NotFound,
		"No secret of that name is served to this peer.",
		"Ask for `default`, the workload's SPIFFE ID, `ROOTCA`, the trust domain's ID, or `ALL`."},
	TypeURLUnknown: {codes.InvalidArgument,
		"The stream asks for a resource type that is no TLS secret.",
		"Set the type URL to type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.Secret; this socket serves SDS only."},
	SocketPath: {codes.InvalidArgument,
		"Something that is not a stale socket of ours stands at the socket's path, or the path cannot be a socket.",
		"Remove the file or choose another path, of at most 107 bytes."},
	SocketInUse: {codes.AlreadyExists,
		"Another process answers at the socket's path, or did.",
		"Stop the other agent, or choose another path. In the place of a shared socket it is a pod's, which mounts the directory without `readOnly: true`: find a pod that does."},
	SocketUnsafeDir: {codes.InvalidArgument,
		"Others than the daemon's own user and root can write to the socket's directory, and so put another socket in its place.",
		"Let that user or root own it and take the write permission of group and others away (chmod go-w), or choose another directory."},
	PeerUnknown: {codes.PermissionDenied,
		"Which process connected to the shared socket, and in which pod it is, cannot be told.",
		"The detail says why. The agent's pod must have hostPID: true and see the host's cgroups (as a privileged container does); a process that ended is none."},
	PeerNotInPod: {codes.PermissionDenied,
		"The process that connected to the shared socket is in no container of a pod.",
		"The shared socket is for pods. If it is one: `sharedSocket.cgroupRoot` must be the kubelet's --cgroup-root, and static pods have no identity."},
	VolumeInvalid: {codes.InvalidArgument,
		"The pod's volume asks for something that the CSI driver does not do, or the CSIDriver object does not let kubelet pass what it needs.",
		"The detail names it: mend the volume in the pod's spec, or the CSIDriver object; docs/csi.md lists what each must hold."},
	VolumeTaken: {codes.FailedPrecondition,
		"The volume is mounted for another pod, or elsewhere.",
		"Kubelets make an ID for each volume of each pod, so this is none's doing: find out what else speaks to the driver's socket."},
	VolumeReplaced: {codes.FailedPrecondition,
		"The pod's volume is served in another directory than the one that containers saw which ran before: the agent's runtimeDir was changed or wiped.",
		"Delete the pod, so that its controller makes it anew: a container that ran before keeps what it holds, until that ends, and finds no socket."},
	MountFailed: {codes.Internal,
		"The pod's directory could not be made or mounted on the node.",
		"The detail has the system's words; look at the agent's mounts and privileges: kubelet's directory must be mounted into it with `mountPropagation: Bidirectional`."},
	KubeletUnregistered: {codes.Unavailable,
		"The kubelet has not registered the agent as CSI driver, so no pod gets a volume of it.",
		"Look whether `csi.registrationDir` is kubelet's `plugins_registry`, mounted at the same path, and at kubelet's log."},
}
