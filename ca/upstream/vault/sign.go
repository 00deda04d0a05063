package vault

import (
	"context"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/meshca/meshca/ca"
)

// backdate is how far Vault sets NotBefore back, which by itself it does by 30 s: as far as that of an SVID lies before its
// issue (a minute), and as far as Vault's clock may be ahead of ours.
const backdate = 5 * time.Minute

// order is the body of a signing: all that the certificate has comes from here, and of the CSR the key alone
// (use_csr_values false).
type order struct {
	CSR               string `json:"csr"`
	CommonName        string `json:"common_name"`
	ExcludeCN         bool   `json:"exclude_cn_from_sans"`
	URISANs           string `json:"uri_sans"`
	MaxPathLength     int    `json:"max_path_length"`
	TTL               string `json:"ttl"`
	NotBeforeDuration string `json:"not_before_duration"`
	KeyUsage          string `json:"key_usage"`
	UseCSRValues      bool   `json:"use_csr_values"`
	Format            string `json:"format"`
}

// signed is what comes back.
type signed struct {
	Certificate string   `json:"certificate"`
	IssuingCA   string   `json:"issuing_ca"`
	Chain       []string `json:"ca_chain"`
}

// SignIntermediate has an issuer sign, by its issuer_id. The request is sent once; only a 403, after which Vault has done
// nothing, has it sent again under a fresh login. A life that Vault shortened is logged and observed.
func (u *Upstream) SignIntermediate(ctx context.Context, ref string, r ca.IntermediateRequest) ([]*x509.Certificate, error) {
	began := time.Now()
	chain, warnings, err := u.sign(ctx, ref, r)
	told := Call{Operation: OpSign, Asked: r.Life, Err: err}
	if err == nil {
		told.Got = time.Until(chain[0].NotAfter).Round(time.Second)
	}
	told.Took = time.Since(began)
	u.observe(told)
	if told.Shortened() {
		u.o.Log.Warn("Vault gave an intermediate a shorter life than it was asked for", "asked", told.Asked, "got", told.Got,
			"issuer", ref, "why", u.shortened(ref, chain[0], told.Asked-told.Got), "vault_says", scrub(strings.Join(warnings, "; ")))
	}
	return chain, err
}

// sign returns the chain, and Vault's warnings.
func (u *Upstream) sign(ctx context.Context, ref string, r ca.IntermediateRequest) ([]*x509.Certificate, []string, error) {
	switch {
	case !refForm.MatchString(ref) || ref == "default":
		return nil, nil, fmt.Errorf("vault: %.100q is no issuer_id", ref)
	case r.Life < time.Second:
		return nil, nil, fmt.Errorf("vault: a life of %s was asked for", r.Life)
	case len(r.CSR) == 0:
		return nil, nil, errors.New("vault: an intermediate needs a certificate request")
	}
	life, err := u.within(ref, r.Life)
	if err != nil {
		return nil, nil, err
	}
	anchors, err := u.anchors()
	if err != nil {
		return nil, nil, err
	}
	var got signed
	e, err := u.call(ctx, request{
		operation: OpSign, what: "signing an intermediate with the issuer " + ref, path: u.issuerPath(ref) + "/sign-intermediate", capability: "update",
		body: order{
			CSR:               string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: r.CSR})),
			CommonName:        r.CommonName,
			ExcludeCN:         true,
			URISANs:           r.TrustDomain.IDString(),
			TTL:               fmt.Sprintf("%ds", int64(life/time.Second)),
			NotBeforeDuration: fmt.Sprintf("%ds", int64(backdate/time.Second)),
			KeyUsage:          "CertSign,CRLSign",
			Format:            "pem",
		},
	}, &got)
	if err != nil {
		return nil, nil, err
	}
	chain, err := u.assemble(ref, got, anchors)
	if err != nil {
		return nil, nil, &Fault{Kind: KindMalformed, What: "signing an intermediate with the issuer " + ref, Why: scrub(err.Error()), cause: err}
	}
	if time.Until(chain[0].NotBefore) > 0 {
		return nil, nil, &Fault{Kind: KindMalformed, What: "signing an intermediate with the issuer " + ref,
			Why: fmt.Sprintf("it is valid from %s only; Vault's clock is %s ahead of ours", stamp(chain[0].NotBefore), u.skew.ahead().Round(time.Second)),
			Do:  "Set the clocks of both machines (NTP)"}
	}
	return chain, e.Warnings, nil
}

// within shortens a life to the end of an issuer's chain: a Vault before 1.17, and an issuer whose leaf_not_after_behavior
// is always_enforce_err, refuse to do that themselves.
func (u *Upstream) within(ref string, life time.Duration) (time.Duration, error) {
	seen, ok := u.state.issuer(ref)
	if !ok || seen.NotAfter.IsZero() {
		return life, nil
	}
	const rounding = 10 * time.Second
	life = min(life, time.Until(seen.NotAfter)-max(u.skew.ahead(), 0)-rounding)
	if life < time.Second {
		return 0, &Fault{Kind: KindRejected, What: "signing an intermediate with the issuer " + ref,
			Why: "its chain ends at " + stamp(seen.NotAfter), Do: "Make another one, and rotate to it"}
	}
	return life, nil
}

// assemble puts what came back in order: the new certificate first, then what leads to the root, without the root. What
// does not belong to the path is left out.
func (u *Upstream) assemble(ref string, got signed, anchors []*x509.Certificate) ([]*x509.Certificate, error) {
	leaf, err := parseCertificates([]byte(got.Certificate))
	if err != nil {
		return nil, fmt.Errorf("the new certificate: %w", err)
	}
	if len(leaf) != 1 {
		return nil, fmt.Errorf("%d certificates stand where the new one should", len(leaf))
	}
	above, err := parseCertificates([]byte(strings.Join(append(got.Chain, got.IssuingCA), "\n")))
	if err != nil {
		return nil, fmt.Errorf("its chain: %w", err)
	}
	// The anchor is the one under which the issuer was listed. Where it was not, there must be no choice.
	if seen, ok := u.state.issuer(ref); ok && seen.Root != nil {
		anchors = []*x509.Certificate{seen.Root}
	}
	p := newPool(anchors)
	p.add(above...)
	path, err := p.path(leaf[0])
	if errors.Is(err, errNoAnchor) {
		return path, nil // whoever asked knows the root, and checks it
	}
	if err != nil {
		return nil, err
	}
	if len(path) == 1 {
		return nil, errors.New("the new certificate is signed by its own key")
	}
	return path[:len(path)-1], nil
}

// shortened says why a life was shortened by so much, as far as can be seen.
func (u *Upstream) shortened(ref string, got *x509.Certificate, by time.Duration) string {
	if seen, ok := u.state.issuer(ref); ok && !seen.NotAfter.IsZero() && !got.NotAfter.Before(seen.NotAfter.Add(-time.Minute)) {
		return fmt.Sprintf("the issuer's chain itself ends at %s: rotate to one that lasts longer", stamp(seen.NotAfter))
	}
	if behind := -u.skew.ahead(); behind > 0 && by < behind+time.Minute {
		return fmt.Sprintf("Vault's clock is %s behind ours, and what it signs ends that much earlier: set the clocks of both machines (NTP)", behind.Round(time.Second))
	}
	return fmt.Sprintf("the mount's longest lease, or the clock: `vault secrets tune -max-lease-ttl=%dh %s` lengthens it", int(u.o.Life.Hours())+1, u.c.Mount)
}
