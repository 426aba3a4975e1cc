"""Operations on host arrays: conversion, checks, weights, padding."""
