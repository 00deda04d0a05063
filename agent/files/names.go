package files

import (
	"bytes"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
)

// Names is a set of file names that a kind of reader expects.
type Names string

// The sets of names.
const (
	// Istio's are those that istio-proxy writes where its OUTPUT_CERTS says: cert-chain.pem, key.pem, root-cert.pem.
	Istio Names = "istio"
	// GKE's are those of managed workload identities and of gRPC's documents on Cloud Service Mesh: certificates.pem,
	// private_key.pem, ca_certificates.pem, and trust_bundles.json, a SPIFFE bundle map (SPIFFE Trust Domain and Bundle
	// §5) that gRPC takes as `spiffe_trust_bundle_map_file` (gRFC A87).
	GKE Names = "gke"
	// TLS are the keys of Secrets of type kubernetes.io/tls, with cert-manager's and service-account volumes' third one:
	// tls.crt, tls.key, ca.crt.
	TLS Names = "tls"
	// CredentialBundle is one file with the key (PKCS#8) and then the chain, as the podCertificate volumes of Kubernetes
	// write it: credentialbundle.pem. Key and chain are then of one read. Beside it: trustbundle.pem.
	CredentialBundle Names = "credentialbundle"
)

// kind is what stands in a file.
type kind int

const (
	chain     kind = iota // PEM, leaf first, without the root
	key                   // PEM, PKCS#8
	both                  // the key, then the chain
	roots                 // PEM
	bundleMap             // SPIFFE bundle map, JSON
)

// secret reports whether it holds the key.
func (k kind) secret() bool { return k == key || k == both }

// identity reports whether it takes an SVID to write it.
func (k kind) identity() bool { return k == chain || k.secret() }

// kinds says what stands in which file of a set.
func (n Names) kinds() map[string]kind {
	switch n {
	case Istio:
		return map[string]kind{"cert-chain.pem": chain, "key.pem": key, "root-cert.pem": roots}
	case GKE:
		return map[string]kind{"certificates.pem": chain, "private_key.pem": key, "ca_certificates.pem": roots, "trust_bundles.json": bundleMap}
	case TLS:
		return map[string]kind{"tls.crt": chain, "tls.key": key, "ca.crt": roots}
	case CredentialBundle:
		return map[string]kind{"credentialbundle.pem": both, "trustbundle.pem": roots}
	}
	return nil
}

// maxNames bounds a list of sets: there are no more.
const maxNames = 4

// ParseNames reads a list of sets, separated by commas.
func ParseNames(s string) ([]Names, error) {
	parts := strings.SplitN(s, ",", maxNames+1)
	if len(parts) > maxNames {
		return nil, fmt.Errorf("more than %d sets of names: there are istio, gke, tls and credentialbundle", maxNames)
	}
	var list []Names
	for _, part := range parts {
		n := Names(strings.TrimSpace(part))
		if n.kinds() == nil {
			return nil, fmt.Errorf("%.40q is no set of names: istio, gke, tls or credentialbundle", string(n))
		}
		if slices.Contains(list, n) {
			return nil, fmt.Errorf("%s stands there twice", n)
		}
		list = append(list, n)
	}
	return list, nil
}

// file is one file of a generation.
type file struct {
	data   []byte
	secret bool
}

// render makes the files of the sets. Without an SVID those that need one are left out.
func render(sets []Names, svid *x509svid.SVID, bundle *spiffebundle.Bundle) (map[string]file, error) {
	var data [bundleMap + 1][]byte
	var err error
	if data[bundleMap], err = mapOf(bundle); err != nil {
		return nil, err
	}
	data[roots] = pemOf(bundle.X509Authorities())
	if svid != nil {
		if data[chain], data[key], err = svid.Marshal(); err != nil {
			return nil, fmt.Errorf("the SVID cannot be written: %w", err)
		}
		data[both] = slices.Concat(data[key], data[chain])
	}
	made := make(map[string]file)
	for _, n := range sets {
		for name, k := range n.kinds() {
			if svid != nil || !k.identity() {
				made[name] = file{data[k], k.secret()}
			}
		}
	}
	return made, nil
}

func pemOf(certs []*x509.Certificate) []byte {
	var b bytes.Buffer
	for _, c := range certs {
		_ = pem.Encode(&b, &pem.Block{Type: "CERTIFICATE", Bytes: c.Raw}) // a buffer takes it all
	}
	return b.Bytes()
}

// mapOf is the bundle as the one entry of a SPIFFE bundle map. Only roots of X.509 go in: readers of files have no use for
// other keys, and some refuse what they do not know.
func mapOf(b *spiffebundle.Bundle) ([]byte, error) {
	x509Only := spiffebundle.FromX509Authorities(b.TrustDomain(), b.X509Authorities())
	if n, ok := b.SequenceNumber(); ok {
		x509Only.SetSequenceNumber(n)
	}
	if hint, ok := b.RefreshHint(); ok {
		x509Only.SetRefreshHint(hint)
	}
	encoded, err := x509Only.Marshal()
	if err != nil {
		return nil, fmt.Errorf("the bundle map cannot be written: %w", err)
	}
	return json.MarshalIndent(map[string]map[string]json.RawMessage{
		"trust_domains": {b.TrustDomain().Name(): encoded},
	}, "", "  ")
}

// parseIdentity finds the SVID in the files of any of the sets.
func parseIdentity(held map[string]file) (*x509svid.SVID, error) {
	for _, n := range []Names{CredentialBundle, Istio, GKE, TLS} {
		var parts [bundleMap + 1][]byte
		for name, k := range n.kinds() {
			parts[k] = held[name].data
		}
		if parts[both] != nil {
			return x509svid.Parse(parts[both], parts[both])
		}
		if parts[chain] != nil && parts[key] != nil {
			return x509svid.Parse(parts[chain], parts[key])
		}
	}
	return nil, errors.New("there is none")
}
