package kubesigner

import (
	"encoding/pem"
	"maps"
	"slices"
	"strings"
	"time"

	certificatesv1 "k8s.io/api/certificates/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/meshca/meshca/api/refusal"
	"github.com/meshca/meshca/attestor"
	"github.com/meshca/meshca/ca"
	"github.com/meshca/meshca/ca/registration"
)

// Extras with which the API server describes who made a request with a service account's bound token
// (k8s.io/apiserver/pkg/authentication/serviceaccount).
const (
	extraPodName      = "authentication.kubernetes.io/pod-name"
	extraPodUID       = "authentication.kubernetes.io/pod-uid"
	extraNodeName     = "authentication.kubernetes.io/node-name"
	extraNodeUID      = "authentication.kubernetes.io/node-uid"
	extraCredentialID = "authentication.kubernetes.io/credential-id"

	accountPrefix = "system:serviceaccount:"
)

// signingRequests is the protocol of certificates.k8s.io/v1 CertificateSigningRequests, which pods make themselves. Who
// made one is in its spec, in the API server's own words.
//
// One that nobody has decided about is decided here and, where it is granted, approved and signed. One that an approver has
// approved goes the same way, for approval is no more than leave to sign: policy still decides, and what it refuses is
// Failed then. One that is denied is let be.
func signingRequests(cluster, signer string) protocol {
	const plural = "certificatesigningrequests"
	return protocol{
		plural: plural, door: "certificatesigningrequest", versions: []string{"v1"},
		rights: []right{
			{"list", plural, "", ""}, {"watch", plural, "", ""}, {"get", plural, "", ""}, {"patch", plural, "", ""},
			{"patch", plural, "approval", ""}, {"patch", plural, "status", ""}, {"approve", "signers", "", signer}, {"sign", "signers", "", signer},
		},
		empty: func() object { return &certificatesv1.CertificateSigningRequest{} },
		open: func(obj object) bool {
			r := signingRequest(obj)
			return r.Spec.SignerName == signer && r.DeletionTimestamp == nil && len(r.Status.Certificate) == 0 &&
				!hasCondition(r, certificatesv1.CertificateDenied) && !hasCondition(r, certificatesv1.CertificateFailed)
		},
		owner: func(obj object) string {
			r := signingRequest(obj)
			return r.Spec.Username + "/" + strings.Join(r.Spec.Extra[extraPodUID], "/")
		},
		strip: func(obj object) {
			r := signingRequest(obj)
			r.ManagedFields, r.Spec.Request, r.Spec.Groups = nil, nil, nil
			maps.DeleteFunc(r.Spec.Extra, func(key string, _ certificatesv1.ExtraValue) bool { return key != extraPodUID })
			if len(r.Status.Certificate) > 0 {
				r.Status.Certificate = []byte{0} // open asks whether there is one
			}
		},
		ask:   func(obj object) (registration.Request, error) { return askSigning(cluster, signingRequest(obj)) },
		grant: func(obj object, svid ca.SVID) []answer { return grantSigning(signingRequest(obj), svid) },
		deny: func(obj object, no *refusal.Error) []answer {
			r := signingRequest(obj)
			if hasCondition(r, certificatesv1.CertificateApproved) {
				return []answer{{"status", conditions(r, certificatesv1.CertificateFailed, string(no.Reason), explained(no))}}
			}
			return []answer{{"approval", conditions(r, certificatesv1.CertificateDenied, string(no.Reason), explained(no))}}
		},
	}
}

func signingRequest(obj object) *certificatesv1.CertificateSigningRequest {
	return obj.(*certificatesv1.CertificateSigningRequest) //nolint:errcheck // empty makes no others
}

func hasCondition(r *certificatesv1.CertificateSigningRequest, kind certificatesv1.RequestConditionType) bool {
	return slices.ContainsFunc(r.Status.Conditions, func(c certificatesv1.CertificateSigningRequestCondition) bool { return c.Type == kind })
}

func askSigning(cluster string, r *certificatesv1.CertificateSigningRequest) (registration.Request, error) {
	extra := func(key string) string { // the one value; several are none
		if v := r.Spec.Extra[key]; len(v) == 1 {
			return v[0]
		}
		return ""
	}
	namespace, account, found := strings.Cut(strings.TrimPrefix(r.Spec.Username, accountPrefix), ":")
	id, err := attestor.NewIdentity(cluster, namespace, account)
	isAccount := strings.HasPrefix(r.Spec.Username, accountPrefix) && found && err == nil
	if !isAccount {
		id = attestor.Identity{}
	}
	ask := registration.Request{
		Door: "certificatesigningrequest",
		Claim: &registration.Claim{Object: string(r.UID), Said: attestor.Evidence{
			Identity: id, Method: attestor.MethodSigningRequest, ServiceAccountUID: r.Spec.UID, PodName: extra(extraPodName), PodUID: extra(extraPodUID),
			NodeName: extra(extraNodeName), NodeUID: extra(extraNodeUID), CredentialID: strings.TrimPrefix(extra(extraCredentialID), "JTI="),
		}},
	}
	said := &ask.Claim.Said
	switch {
	case !isAccount:
		return ask, refusal.New(refusal.TokenNotServiceAccount, "the request was made by %.100q", r.Spec.Username).On("spec.username")
	case said.PodName == "" || said.PodUID == "":
		return ask, refusal.New(refusal.TokenUnbound, "the request was made with a token of %s/%s that is bound to no pod", namespace, account).On("spec.extra")
	case said.NodeName == "" || said.NodeUID == "":
		return ask, refusal.New(refusal.NodeUnknown, "the request was made with a token of %s/%s that names no node", namespace, account).On("spec.extra")
	}
	if err := checkUsages(r.Spec.Usages); err != nil {
		return ask, err
	}
	if s := r.Spec.ExpirationSeconds; s != nil {
		if ask.TTL = time.Duration(*s) * time.Second; ask.TTL <= 0 {
			return ask, refusal.New(refusal.RequestMalformed, "a life of %s is asked for", ask.TTL).On("spec.expirationSeconds")
		}
	}
	block, rest := pem.Decode(r.Spec.Request)
	if block == nil || block.Type != "CERTIFICATE REQUEST" || len(strings.TrimSpace(string(rest))) > 0 {
		return ask, refusal.New(refusal.CSRMalformed, "spec.request is not one PEM block CERTIFICATE REQUEST").On("spec.request")
	}
	ask.CSR = block.Bytes
	return ask, nil
}

// checkUsages wants what is signed to be what was asked for: a certificate for both ends of TLS. That RSA keys have key
// encipherment too is not asked for by everyone who has one, and asked for by many who have none: it may be there.
func checkUsages(usages []certificatesv1.KeyUsage) error {
	wanted := []certificatesv1.KeyUsage{certificatesv1.UsageDigitalSignature, certificatesv1.UsageServerAuth, certificatesv1.UsageClientAuth}
	for _, u := range usages {
		if u != certificatesv1.UsageKeyEncipherment && !slices.Contains(wanted, u) {
			return refusal.New(refusal.RequestMalformed, "the usage %.50q is asked for, and SVIDs have none but %q", u, wanted).On("spec.usages")
		}
	}
	for _, w := range wanted {
		if !slices.Contains(usages, w) {
			return refusal.New(refusal.RequestMalformed, "SVIDs have the usages %q, and the request does not ask for %q", wanted, w).On("spec.usages")
		}
	}
	return nil
}

func grantSigning(r *certificatesv1.CertificateSigningRequest, svid ca.SVID) []answer {
	signed := answer{"status", map[string]any{"certificate": chainPEM(svid)}}
	if hasCondition(r, certificatesv1.CertificateApproved) {
		return []answer{signed}
	}
	return []answer{{"approval", conditions(r, certificatesv1.CertificateApproved, "Granted", "policy grants "+svid.ID.String())}, signed}
}

// conditions are those that the request has, and one more.
func conditions(r *certificatesv1.CertificateSigningRequest, kind certificatesv1.RequestConditionType, reason, message string) map[string]any {
	return map[string]any{"conditions": append(slices.Clone(r.Status.Conditions), certificatesv1.CertificateSigningRequestCondition{
		Type: kind, Status: corev1.ConditionTrue, Reason: reason, Message: message, LastUpdateTime: metav1.Now(),
	})}
}
