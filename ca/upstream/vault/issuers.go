package vault

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/meshca/meshca/ca"
)

const (
	// maxIssuers bounds how many issuers of a mount are read: each is a call.
	maxIssuers = 32
	// maxIncluded bounds how many of them are those that were asked for.
	maxIncluded = 8
)

// listing is what Vault says of a mount's issuers at once.
type listing struct {
	Keys    []string `json:"keys"`
	KeyInfo map[string]struct {
		Name    string `json:"issuer_name"`
		Default bool   `json:"is_default"`
		KeyID   string `json:"key_id"`
	} `json:"key_info"`
}

// entry is what Vault says of one issuer.
type entry struct {
	ID          string   `json:"issuer_id"`
	Name        string   `json:"issuer_name"`
	KeyID       string   `json:"key_id"`
	Certificate string   `json:"certificate"`
	Chain       []string `json:"ca_chain"`
	Usage       string   `json:"usage"`
	Revoked     bool     `json:"revoked"`
}

// issuer is an entry whose certificates were read.
type issuer struct {
	entry
	cert  *x509.Certificate
	chain []*x509.Certificate
}

func parseIssuer(e entry) (*issuer, error) {
	if !refForm.MatchString(e.ID) {
		return nil, fmt.Errorf("%w: an issuer's id is no id", errNonsense)
	}
	certs, err := parseCertificates([]byte(e.Certificate))
	if err != nil {
		return nil, fmt.Errorf("the issuer's certificate: %w", err)
	}
	if len(certs) != 1 {
		return nil, fmt.Errorf("%w: an issuer has %d certificates", errNonsense, len(certs))
	}
	i := &issuer{entry: e, cert: certs[0]}
	if len(e.Chain) > 0 {
		if i.chain, err = parseCertificates([]byte(strings.Join(e.Chain, "\n"))); err != nil {
			return nil, fmt.Errorf("the issuer's chain: %w", err)
		}
	}
	return i, nil
}

// Issuers lists the mount's issuers, the one that the configuration names first. One that could not be used carries the
// reason and what to do about it, and so does a named one that the mount does not have. At most 32 are read, those of Rely
// and Include among them; Status tells how many were left out.
func (u *Upstream) Issuers(ctx context.Context) ([]ca.UpstreamIssuer, error) {
	var list listing
	r := request{operation: OpList, what: "listing the issuers of " + u.c.Mount, path: u.c.Mount + "/issuers", capability: "list",
		query: map[string][]string{"list": {"true"}}}
	if _, err := u.call(ctx, r, &list); err != nil {
		return nil, err
	}
	named := u.resolve(list)
	order := u.order(list, named)
	relied := u.relied()
	signing := list.findAll(relied)
	read, faults, err := u.readIssuers(ctx, list, order)
	if err != nil {
		return nil, err
	}
	anchors, err := u.anchors()
	if err != nil {
		return nil, err
	}
	all := newPool(anchors)
	for _, x := range read {
		if x != nil {
			all.add(x.cert)
			all.add(x.chain...)
		}
	}
	var shown []ca.UpstreamIssuer
	if named == "" {
		shown = append(shown, ca.UpstreamIssuer{Name: u.c.Issuer, Named: true, Fault: u.notThere(list)})
	}
	for i, id := range order {
		s := u.show(id, list.KeyInfo[id].Name, read[i], faults[i], all)
		s.Named = id == named
		candidate := !s.Named && !slices.Contains(signing, id) // one that signs does so to its end
		if needed := time.Now().Add(u.o.Life); s.Fault == nil && candidate && s.NotAfter.Before(needed) {
			s.Fault = fmt.Errorf("its chain ends at %s, before an intermediate of %s would: make one that lasts, and rotate to that", stamp(s.NotAfter), u.o.Life)
		}
		shown = append(shown, s)
	}
	failed := u.failing(list, relied, shown)
	u.state.called(OpRely, failed)
	u.observe(Call{Operation: OpRely, Err: failed})
	u.state.saw(shown, max(len(list.Keys)-len(order), 0), u.moved(list, named))
	return shown, nil
}

// readIssuers reads them, or says for each why it could not be read. What is not their own fault is an error. A policy may
// be for some issuers alone, so one that nobody named may be denied, time and again.
func (u *Upstream) readIssuers(ctx context.Context, list listing, order []string) (read []*issuer, faults []error, err error) {
	read, faults = make([]*issuer, len(order)), make([]error, len(order))
	named, asked := u.resolve(list), u.asked(list)
	for i, id := range order {
		if !slices.Contains(list.Keys, id) { // Vault answers a question for it with 500
			faults[i] = u.gone()
			continue
		}
		read[i], faults[i] = u.readIssuer(ctx, id, id != named && !slices.Contains(asked, id))
		switch KindOf(faults[i]) {
		case KindNone, KindMissing, KindMalformed, KindOther: // the issuer's own
		case KindDenied:
			if id == named {
				return nil, nil, faults[i]
			}
			u.exclude(id, list.KeyInfo[id].Name) // whoever named it is told; polls need not log in for it from now on
		default: // what hits one hits all, and says nothing of this issuer
			return nil, nil, faults[i]
		}
	}
	return read, faults, nil
}

func (u *Upstream) gone() error {
	return fmt.Errorf("the mount %s does not have it any more: bring it back, or rotate to another one: certctl ca rotate root --issuer REF. "+
		"Where the same root was imported again, REF is the issuer_id that it got then", u.c.Mount)
}

// resolve finds the issuer_id of the issuer that the configuration names, once: a name may be given to another key. Empty:
// the mount has none of this name.
func (u *Upstream) resolve(list listing) string {
	if id := u.named.Load(); id != nil {
		return *id
	}
	if id := list.find(u.c.Issuer); id != "" {
		u.named.CompareAndSwap(nil, &id)
		return *u.named.Load()
	}
	return ""
}

// find returns the issuer_id of an issuer, by that or by its name; empty when there is none.
func (l listing) find(name string) string {
	for _, id := range l.Keys {
		if refForm.MatchString(id) && (id == name || l.KeyInfo[id].Name == name) {
			return id
		}
	}
	return ""
}

// findAll returns the issuer_ids of those that there are.
func (l listing) findAll(all []string) (ids []string) {
	for _, name := range all {
		if id := l.find(name); name != "" && id != "" && !slices.Contains(ids, id) {
			ids = append(ids, id)
		}
	}
	return ids
}

// notThere is the fault of the issuer that the configuration names, where the mount does not have it.
func (u *Upstream) notThere(list listing) error {
	return &Fault{Kind: KindMissing, What: "looking for the issuer " + u.c.Issuer, Why: fmt.Sprintf("the mount %s has none of this id or name", u.c.Mount),
		Do: "Set upstream.vault.issuer to one that it has, best to the one that signs (`certctl ca status`). It has " + names(list)}
}

// moved says that the configuration's name belongs to another issuer by now; empty when it does not.
func (u *Upstream) moved(list listing, named string) string {
	for id, info := range list.KeyInfo {
		if info.Name == u.c.Issuer && id != named {
			return fmt.Sprintf("the name %s belongs to the issuer %.64q by now; meshca goes on with %s, and would take the other one after "+
				"a restart: set upstream.vault.issuer to %s", u.c.Issuer, id, named, named)
		}
	}
	return ""
}

// names tells people what issuers there are.
func names(list listing) string {
	var all []string
	for _, id := range list.Keys[:min(len(list.Keys), maxIssuers)] {
		name := list.KeyInfo[id].Name
		if name == "" {
			name = "no name"
		}
		all = append(all, fmt.Sprintf("%.64q (%.64q)", id, name))
	}
	if len(all) == 0 {
		return "none: make one with `vault write MOUNT/root/generate/internal`"
	}
	return strings.Join(all, ", ")
}

// Include has Issuers list these from now on, each by its issuer_id or name, however many others there are. The last 8 are
// remembered.
func (u *Upstream) Include(names ...string) {
	u.mu.Lock()
	defer u.mu.Unlock()
	for _, name := range names {
		if refForm.MatchString(name) {
			u.included = append(slices.DeleteFunc(slices.Clone(u.included), func(n string) bool { return n == name }), name)
		}
	}
	u.included = slices.Clone(u.included[max(0, len(u.included)-maxIncluded):])
}

// exclude forgets that somebody asked for an issuer.
func (u *Upstream) exclude(id, name string) {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.included = slices.DeleteFunc(slices.Clone(u.included), func(n string) bool { return n == id || n == name })
}

// asked are the ids of the issuers that sign, or that somebody asked for.
func (u *Upstream) asked(list listing) []string {
	u.mu.Lock()
	included := u.included
	u.mu.Unlock()
	return list.findAll(slices.Concat(u.relied(), included))
}

// LeftOut is how many issuers the mount had beyond those that were read, when they were read last.
func (u *Upstream) LeftOut() int { return u.Status().LeftOut }

// order is whom to read: the named one first, then those that were asked for, then in the order of their ids.
func (u *Upstream) order(list listing, named string) []string {
	var first, rest []string
	if named != "" {
		first = append(first, named)
	}
	for _, id := range u.asked(list) {
		if id != named {
			first = append(first, id)
		}
	}
	for _, id := range list.Keys {
		if refForm.MatchString(id) && !slices.Contains(first, id) {
			rest = append(rest, id)
		}
	}
	slices.Sort(rest)
	rest = slices.Compact(rest)
	return append(first, rest[:min(len(rest), maxIssuers-len(first))]...)
}

func (u *Upstream) readIssuer(ctx context.Context, id string, candidate bool) (*issuer, error) {
	var e entry
	r := request{operation: OpRead, what: "reading the issuer " + id, path: u.issuerPath(id), capability: "read", candidate: candidate}
	if _, err := u.call(ctx, r, &e); err != nil {
		return nil, err
	}
	if e.ID != id {
		return nil, fmt.Errorf("%w: it is about another issuer", errNonsense)
	}
	return parseIssuer(e)
}

func (u *Upstream) issuerPath(id string) string { return u.c.Mount + "/issuer/" + id }

func (u *Upstream) anchors() ([]*x509.Certificate, error) {
	if u.c.RootFile == "" {
		return nil, nil
	}
	certs, err := readCertificates(u.c.RootFile)
	if err != nil {
		return nil, &Fault{Kind: KindFile, What: "reading upstream.vault.rootFile", Why: err.Error(), cause: err}
	}
	for _, c := range certs {
		if !selfSigned(c) {
			return nil, &Fault{Kind: KindFile, What: "reading upstream.vault.rootFile",
				Why: fmt.Sprintf("%s holds %q, which is not signed by its own key", u.c.RootFile, c.Subject), Do: "Put the root there"}
		}
	}
	return certs, nil
}

// show makes of an issuer what the CA sees.
func (u *Upstream) show(id, name string, x *issuer, failed error, all *pool) ca.UpstreamIssuer {
	s := ca.UpstreamIssuer{Ref: id, Name: scrub(name), Fault: failed}
	if failed != nil {
		return s
	}
	path, err := all.path(x.cert)
	switch {
	case errors.Is(err, errNoAnchor):
		s.Fault = fmt.Errorf("%w: %q signed the last certificate of it, and the mount %s does not hold that. Put the root into a file and name it in upstream.vault.rootFile",
			err, path[len(path)-1].Issuer, u.c.Mount)
	case err != nil:
		s.Fault = fmt.Errorf("%w: name the one that is to be trusted in upstream.vault.rootFile", err)
	default:
		s.Root, s.Path = path[len(path)-1], path[:len(path)-1]
	}
	s.NotAfter = earliestEnd(append(path, x.cert))
	if s.Fault == nil {
		s.Fault = u.unfit(x, path, time.Now())
	}
	return s
}

func earliestEnd(certs []*x509.Certificate) time.Time {
	return slices.MinFunc(certs, func(a, b *x509.Certificate) int { return a.NotAfter.Compare(b.NotAfter) }).NotAfter
}

// unfit says why an issuer cannot sign intermediates, and what to do.
func (u *Upstream) unfit(x *issuer, path []*x509.Certificate, now time.Time) error {
	set := "vault write " + u.issuerPath(x.ID)
	switch {
	case x.KeyID == "":
		return fmt.Errorf("the mount has no key for it, so it can sign nothing: name another issuer, or import the key with `vault write %s/issuers/import/bundle pem_bundle=@FILE`", u.c.Mount)
	case x.Revoked:
		return errors.New("it was revoked: name another issuer")
	case !slices.Contains(strings.Split(x.Usage, ","), "issuing-certificates"):
		return fmt.Errorf("its usage (%.100q) does not have issuing-certificates: `%s usage=read-only,issuing-certificates,crl-signing`", x.Usage, set)
	}
	for i, c := range path {
		switch {
		case !c.BasicConstraintsValid || !c.IsCA:
			return fmt.Errorf("%q of its chain is no CA: name another issuer", c.Subject)
		case c.MaxPathLen >= 0 && c.MaxPathLen < i+1: // parsed: -1 is none
			return fmt.Errorf("%q of its chain has path length %d, which leaves no room for an intermediate below: name another issuer", c.Subject, c.MaxPathLen)
		case now.Before(c.NotBefore):
			return fmt.Errorf("%q of its chain is valid from %s only: look at the clocks (Vault's is %s ahead of ours)", c.Subject, stamp(c.NotBefore), u.skew.ahead())
		case now.After(c.NotAfter):
			return fmt.Errorf("%q of its chain ended at %s: make a new one with `vault write %s/root/rotate/internal` and rotate to it", c.Subject, stamp(c.NotAfter), u.c.Mount)
		}
		if err := ca.CheckIssuerKey(c.PublicKey); err != nil {
			return fmt.Errorf("%q of its chain has %w. Name another issuer, or make one with `vault write %s/root/rotate/internal key_type=ec key_bits=256 common_name=NAME` and rotate to it",
				c.Subject, err, u.c.Mount)
		}
		if err := ca.CheckIssuerUsage(c); err != nil {
			return fmt.Errorf("%q of its chain has %w. Name another issuer, or make one with `vault write %s/root/rotate/internal common_name=NAME` and rotate to it",
				c.Subject, err, u.c.Mount)
		}
	}
	return nil
}

func stamp(t time.Time) string { return t.UTC().Format(time.RFC3339) }
