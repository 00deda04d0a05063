package main

import (
	"context"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"sync"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/meshca/meshca/api/admin"
	meshcav1 "github.com/meshca/meshca/api/meshca/v1"
	"github.com/meshca/meshca/api/serial"
	"github.com/meshca/meshca/ca"
	"github.com/meshca/meshca/rotation"
)

// adminServer puts the admin socket's server together.
func (d *daemon) adminServer() (*admin.Server, error) {
	attestors := make(map[string]admin.Attestor, len(d.clusters))
	for name, c := range d.clusters {
		attestors[name] = c
	}
	return admin.New(admin.Config{
		TrustDomain: d.config.trustDomain, Status: d.status, Checks: d.checks, Bundle: d.trust.Bundle, Ledger: d.store,
		Decisions: d.journal.Ring(), Orders: d.orders, Policy: func() admin.Policy { return d.policy.current.Value() },
		Clusters: attestors, Connected: d.connected, Authorities: d.operator, Roots: d.operator, Agents: d.agents.List,
		Backup: d.backup, Continuity: accepting{d.continuity, d.roller}, MaxLife: ca.MaxTTL, Audit: d.journal.Admin, Log: d.log,
		Now: d.clock.Now,
	})
}

// connected is how many agents have an open Sync stream.
func (d *daemon) connected() int {
	n := 0
	for _, a := range d.agents.List() {
		if a.Connected {
			n++
		}
	}
	return n
}

// status describes the CA as it is now, for certctl.
func (d *daemon) status(ctx context.Context) (*meshcav1.GetStatusResponse, error) {
	entries, err := d.store.LedgerSize(ctx)
	if err != nil {
		return nil, err
	}
	bundle, _ := d.trust.Bundle()
	sequence, _ := bundle.SequenceNumber()
	issued, refused, ended := d.decisions.Counts()
	why := d.notReady()
	s := &meshcav1.GetStatusResponse{
		Version: version, TrustDomain: d.config.trustDomain.Name(), StartedAt: timestamppb.New(d.started), ServerTime: timestamppb.Now(),
		Ready: len(why) == 0, NotReady: why, BundleSequence: sequence, Issued: issued, Refused: refused, Ended: ended,
		Store: "bolt " + d.storePath(), LedgerEntries: entries, MaxSvidTtl: durationpb.New(d.config.SVID.TTL.Duration),
	}
	if s.GetReady() {
		s.Degraded = d.degraded()
	}
	if until := d.authority.IssuesUntil(); !until.IsZero() {
		s.IssuesUntil = timestamppb.New(until)
	}
	for _, root := range bundle.X509Authorities() {
		s.Authorities = append(s.Authorities, describe("root", "trusted", root))
	}
	s.Authorities = append(s.Authorities, d.ownAuthorities()...)
	for _, name := range sortedNames(d.clusters) {
		s.Clusters = append(s.Clusters, d.clusterStatus(name))
	}
	state := d.policy.status.Value()
	s.Policy = &meshcav1.PolicyStatus{
		File: d.config.PolicyFile, Rules: uint32(d.policy.current.Value().Rules()), LoadedAt: timestamppb.New(state.loadedAt), LastError: errorText(state.err),
	}
	for _, a := range d.agents.List() {
		info := &meshcav1.AgentInfo{
			SpiffeId: a.ID, Cluster: a.Cluster, Version: a.Version, LastSeen: timestamppb.New(a.LastSeen),
			AckedBundleSequence: a.AckedSequence, Connected: a.Connected,
		}
		if len(a.Instances) > 0 {
			i := a.Instances[0]
			info.Node, info.NodeUid, info.Pod, info.PodUid = i.NodeName, i.NodeUID, i.Namespace+"/"+i.PodName, i.PodUID
		}
		s.Agents = append(s.Agents, info)
	}
	return s, nil
}

// ownAuthorities are the intermediate that signs and the CA's own SVID, with how their last renewals went.
func (d *daemon) ownAuthorities() []*meshcav1.AuthorityStatus {
	var all []*meshcav1.AuthorityStatus
	add := func(kind, state string, chain []*x509.Certificate, renewAt time.Time, err error) {
		if len(chain) == 0 {
			all = append(all, &meshcav1.AuthorityStatus{Kind: kind, State: "missing", LastError: errorText(err)})
			return
		}
		a := describe(kind, state, chain[0])
		a.LastError = errorText(err)
		if !renewAt.IsZero() {
			a.RenewAt = timestamppb.New(renewAt)
		}
		all = append(all, a)
	}
	lines, _ := d.authority.Lines()
	for _, l := range lines {
		st := l.Status()
		add("intermediate", signs(d.authority.Assignment(), st.Root), st.Chain, d.attempts.planned(l), st.LastError)
	}
	svid, _, err := d.serving.Status()
	add("server", "serving", svid.Chain, d.attempts.planned(d.serving), err)
	return all
}

func (d *daemon) clusterStatus(name string) *meshcav1.ClusterStatus {
	c := d.clusters[name].Status()
	s := &meshcav1.ClusterStatus{
		Name: name, Mode: string(c.Mode), Liveness: string(c.Liveness), Healthy: c.Healthy, LastError: c.LastError, KeyIds: c.KeyIDs, Issuer: c.Issuer,
		WatchFault: c.WatchFault,
	}
	for _, k := range d.config.Clusters {
		s.SameNamespaces = s.GetSameNamespaces() || k.Name == name && k.SameNamespaces
	}
	if !c.SkewMeasured.IsZero() {
		s.ClockSkew = durationpb.New(c.ClockSkew)
	}
	if signer := d.signers[name]; signer != nil {
		for _, x := range signer.Status() {
			s.Signers = append(s.Signers, &meshcav1.SignerStatus{Api: x.API, Version: x.Version, State: x.State, Why: x.Why, Pending: uint32(x.Pending)})
		}
	}
	if publisher := d.publishers[name]; publisher != nil {
		for _, x := range publisher.Status() {
			s.Published = append(s.Published, &meshcav1.PublicationStatus{
				Name: x.Name, Sequence: x.Sequence, Since: timestamp(x.Since), NotServed: x.NotServed, Fault: x.Fault, Apart: x.Apart,
			})
		}
	}
	return s
}

// checks looks at what the status does not show: files that others could read or change.
func (d *daemon) checks(ctx context.Context) []*meshcav1.Finding {
	var found []*meshcav1.Finding
	private := func(subject, path string) {
		f := &meshcav1.Finding{Subject: subject, Level: meshcav1.Finding_LEVEL_OK, Detail: path + " is readable by the CA alone"}
		info, err := os.Stat(path)
		switch {
		case err != nil:
			f.Level, f.Detail = meshcav1.Finding_LEVEL_ERROR, err.Error()
			f.Hint = "The CA runs on what it has open; restore the file before it restarts."
		case info.Mode().Perm()&0o077 != 0:
			f.Level, f.Detail = meshcav1.Finding_LEVEL_ERROR, fmt.Sprintf("%s has mode %04o", path, info.Mode().Perm())
			f.Hint = fmt.Sprintf("chmod go= %s", path)
		}
		found = append(found, f)
	}
	private("store", d.storePath())
	for _, secret := range d.config.secrets() {
		if secret.key == rootKey && d.replaced(ctx) {
			if _, err := os.Stat(secret.path); errors.Is(err, fs.ErrNotExist) {
				continue // it has done its work
			}
		}
		private(secret.key, secret.path)
	}
	private("admin socket", d.config.AdminSocket)
	if d.config.Audit.File != "" {
		private("audit log", d.config.Audit.File)
	}
	return found
}

// replaced reports whether the root that the configuration names has no part any more in what is signed.
func (d *daemon) replaced(ctx context.Context) bool {
	issuers, err := d.upstream.Issuers(ctx)
	if err != nil {
		return false
	}
	r := d.operator.Standing().Rollout
	for _, i := range issuers {
		if i.Named && (i.Ref == r.Signer().Ref || r.Active() && (i.Ref == r.Old.Ref || i.Ref == r.New.Ref)) {
			return false
		}
	}
	return true
}

func describe(kind, state string, c *x509.Certificate) *meshcav1.AuthorityStatus {
	sum := sha256.Sum256(c.Raw)
	return &meshcav1.AuthorityStatus{
		Kind: kind, State: state, Subject: c.Subject.String(), Serial: serial.String(c.SerialNumber), KeyId: hex.EncodeToString(c.SubjectKeyId),
		NotBefore: timestamppb.New(c.NotBefore), NotAfter: timestamppb.New(c.NotAfter), Fingerprint: hex.EncodeToString(sum[:]),
	}
}

// attempts hold the last attempt (rotation.Attempt) at each rotation.Subject that is kept: of intermediates there may be
// two.
type attempts struct{ sync.Map }

// planned is when Keep will next renew it; zero where it has not tried yet.
func (a *attempts) planned(s rotation.Subject) time.Time {
	last, _ := a.Load(s)
	attempt, _ := last.(rotation.Attempt)
	return attempt.Next
}
