package main

import (
	"context"
	"fmt"
	"io"
	"log/slog"

	"github.com/meshca/meshca/agent"
	"github.com/meshca/meshca/agent/csi"
	"github.com/meshca/meshca/agent/taint"
	"github.com/meshca/meshca/cmd/internal/incluster"
)

// run puts the agent together and runs it until ctx ends.
func run(ctx context.Context, c *Config, stderr io.Writer) error {
	level, err := c.logLevel()
	if err != nil {
		return err
	}
	log := slog.New(slog.NewJSONHandler(stderr, &slog.HandlerOptions{Level: level}))
	config, err := c.agent(log)
	if err != nil {
		return err
	}
	if c.CSI.Enabled {
		driver, err := csi.New(c.CSI.driver(c.RuntimeDir, log))
		if err != nil {
			return err
		}
		config.Sources = append(config.Sources, driver)
	}
	if shared := c.SharedSocket.source(c, log); shared != nil {
		config.Sources = append(config.Sources, shared)
	}
	delivered, err := c.files(log)
	if err != nil {
		return err
	}
	if delivered != nil {
		config.Sources = append(config.Sources, delivered)
	}
	if c.StartupTaint != "" {
		api, err := incluster.New()
		if err != nil {
			return fmt.Errorf("startupTaint: %w", err)
		}
		remover, err := taint.New(taint.Config{Key: c.StartupTaint, Node: c.CSI.NodeName, API: api, Log: log})
		if err != nil {
			return err
		}
		config.Sources = append(config.Sources, remover)
	}
	a, err := agent.New(config)
	if err != nil {
		return err
	}
	return a.Run(ctx)
}
