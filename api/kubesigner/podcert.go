package kubesigner

import (
	"time"

	certificatesv1beta1 "k8s.io/api/certificates/v1beta1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/meshca/meshca/api/refusal"
	"github.com/meshca/meshca/attestor"
	"github.com/meshca/meshca/ca"
	"github.com/meshca/meshca/ca/registration"
	"github.com/meshca/meshca/rotation"
)

// Bounds that the API server holds a PodCertificateRequest's answer to (k8s.io/api/certificates/v1beta1,
// ValidatePodCertificateRequestStatusUpdate). Lives there are from NotBefore on.
const (
	podCertificateLeast   = time.Hour        // the shortest life
	podCertificateDefault = 24 * time.Hour   // maxExpirationSeconds where a request has none
	podCertificateNear    = 5 * time.Minute  // how far NotBefore may lie from the API server's now
	podCertificateRefresh = 10 * time.Minute // beginRefreshAt keeps this distance from both ends
)

// podCertificates is the protocol of KEP-4317: kubelet makes a key and a request for a pod's volume, and puts key and chain
// into the volume. Denied is final there: the pod has to be made again.
func podCertificates(cluster, signer string) protocol {
	const plural = "podcertificaterequests"
	return protocol{
		plural: plural, door: "podcertificaterequest", versions: []string{"v1", "v1beta1"},
		rights: []right{
			{"list", plural, "", ""}, {"watch", plural, "", ""}, {"get", plural, "", ""}, {"patch", plural, "", ""}, {"patch", plural, "status", ""},
			{"sign", "signers", "", signer},
		},
		empty: func() object { return &certificatesv1beta1.PodCertificateRequest{} },
		open:  func(obj object) bool { return podCertificateOpen(podCertificate(obj), signer) },
		owner: func(obj object) string { return obj.GetNamespace() + "/" + string(podCertificate(obj).Spec.PodUID) },
		strip: func(obj object) {
			r := podCertificate(obj)
			r.ManagedFields, r.Spec.StubPKCS10Request, r.Spec.PKIXPublicKey, r.Spec.ProofOfPossession = nil, nil, nil, nil //nolint:staticcheck // 1.35's form
			r.Spec.UnverifiedUserAnnotations, r.Status.CertificateChain = nil, ""
		},
		ask: func(obj object) (registration.Request, error) { return askPodCertificate(cluster, podCertificate(obj)) },
		grant: func(obj object, svid ca.SVID) []answer {
			return grantPodCertificate(cluster, podCertificate(obj), svid)
		},
		deny: func(_ object, no *refusal.Error) []answer {
			return []answer{{"status", map[string]any{"conditions": []metav1.Condition{
				podCertificateCondition(certificatesv1beta1.PodCertificateRequestConditionTypeDenied, denialReason(no), explained(no)),
			}}}}
		},
		maxSkew: 2 * time.Minute, // see deliverable: together they stay within podCertificateNear
	}
}

func podCertificate(obj object) *certificatesv1beta1.PodCertificateRequest {
	return obj.(*certificatesv1beta1.PodCertificateRequest) //nolint:errcheck // empty makes no others
}

func podCertificateOpen(r *certificatesv1beta1.PodCertificateRequest, signer string) bool {
	if r.Spec.SignerName != signer || r.DeletionTimestamp != nil {
		return false
	}
	for _, c := range r.Status.Conditions {
		switch c.Type {
		case certificatesv1beta1.PodCertificateRequestConditionTypeIssued, certificatesv1beta1.PodCertificateRequestConditionTypeDenied,
			certificatesv1beta1.PodCertificateRequestConditionTypeFailed:
			return false
		}
	}
	return true
}

func askPodCertificate(cluster string, r *certificatesv1beta1.PodCertificateRequest) (registration.Request, error) {
	most := podCertificateDefault
	if s := r.Spec.MaxExpirationSeconds; s != nil {
		most = time.Duration(*s) * time.Second
	}
	id, err := attestor.NewIdentity(cluster, r.Namespace, r.Spec.ServiceAccountName)
	ask := registration.Request{
		Door: "podcertificaterequest", CSR: r.Spec.StubPKCS10Request,
		// The API counts from NotBefore, and we from now.
		TTL: most - ca.DefaultBackdate, AtLeast: podCertificateLeast - ca.DefaultBackdate,
		Claim: &registration.Claim{Object: string(r.UID), Said: attestor.Evidence{
			Identity: id, Method: attestor.MethodPodCertificate, ServiceAccountUID: string(r.Spec.ServiceAccountUID),
			PodName: r.Spec.PodName, PodUID: string(r.Spec.PodUID), NodeName: string(r.Spec.NodeName), NodeUID: string(r.Spec.NodeUID),
		}},
	}
	if len(ask.CSR) == 0 { // Kubernetes 1.35 proves the key without a CSR
		ask.Proof = &ca.KeyProof{
			PKIX: r.Spec.PKIXPublicKey, Signed: []byte(r.Spec.PodUID), Signature: r.Spec.ProofOfPossession, //nolint:staticcheck // 1.35's form
		}
	}
	switch {
	case err != nil:
		return ask, refusal.New(refusal.RequestMalformed, "%w", err).On("spec.serviceAccountName")
	case most < podCertificateLeast:
		return ask, refusal.New(refusal.RequestMalformed, "a life of %s at most is asked for, and the API has none below %s", most, podCertificateLeast).On("spec.maxExpirationSeconds")
	}
	for key := range r.Spec.UnverifiedUserAnnotations {
		return ask, refusal.New(refusal.RequestMalformed, "this signer knows no userAnnotations, and the volume has %.100q: take them out of the pod's podCertificate", key).
			On(userAnnotations)
	}
	return ask, nil
}

const userAnnotations = "spec.unverifiedUserAnnotations"

// denialReason is the condition's: ours, but for the two that the API has words of its own for.
func denialReason(no *refusal.Error) string {
	switch {
	case no.Reason == refusal.CSRKey:
		return certificatesv1beta1.PodCertificateRequestConditionUnsupportedKeyType
	case no.Claim == userAnnotations:
		return certificatesv1beta1.PodCertificateRequestConditionInvalidUserConfig
	}
	return string(no.Reason)
}

func grantPodCertificate(cluster string, r *certificatesv1beta1.PodCertificateRequest, svid ca.SVID) []answer {
	leaf := svid.Chain[0]
	return []answer{{"status", map[string]any{
		"conditions": []metav1.Condition{
			podCertificateCondition(certificatesv1beta1.PodCertificateRequestConditionTypeIssued, "Issued", svid.ID.String()),
		},
		"certificateChain": string(chainPEM(svid)),
		"notBefore":        metav1.NewTime(leaf.NotBefore), "notAfter": metav1.NewTime(leaf.NotAfter),
		"beginRefreshAt": metav1.NewTime(beginRefresh(cluster, r, svid)),
	}}}
}

// beginRefresh is when kubelet is to ask for the successor: the phase of this identity in this pod, as every SVID's.
// Kubelet adds up to five minutes of its own.
func beginRefresh(cluster string, r *certificatesv1beta1.PodCertificateRequest, svid ca.SVID) time.Time {
	key := cluster + "\x00" + string(r.Spec.NodeUID) + "\x00" + string(r.Spec.PodUID) + "\x00" + svid.ID.String()
	due := rotation.Phased(key)(rotation.Term{Life: svid.Life, Left: svid.Life, Received: svid.IssuedAt})
	leaf := svid.Chain[0]
	if first := leaf.NotBefore.Add(podCertificateRefresh); due.Before(first) {
		due = first
	}
	if last := leaf.NotAfter.Add(-podCertificateRefresh); due.After(last) {
		due = last
	}
	return due.UTC().Truncate(time.Second)
}

func podCertificateCondition(kind, reason, message string) metav1.Condition {
	return metav1.Condition{Type: kind, Status: metav1.ConditionTrue, Reason: reason, Message: message, LastTransitionTime: metav1.Now()}
}
